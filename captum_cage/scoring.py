"""What the language model itself says: its limits, its text and its probabilities."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from captum_cage._captum import DEFAULT_GEN_ARGS, LLMAttributionObject, family
from captum_cage._checks import complaint
from captum_cage._model import text_config
from captum_cage._restored import evaluated
from captum_cage.causal import CausalModel
from captum_cage.inputs import (
    Prompt,
    extended_model_input,
    text_before,
    token_ids,
)
from captum_cage.task import check_scores
from captum_cage.text import decode

__all__ = [
    "check_baseline",
    "check_model",
    "check_sequence",
    "context_length",
    "continued_ids",
    "generate_ids",
    "held",
    "log_probabilities",
    "most_new_tokens",
    "next_token_probabilities",
    "scores_after",
]

_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
)

# Tokens in all that transformers generates where nothing else is said.
_MAX_LENGTH = 20


class _Hold:
    """Who holds a model: a lock, and whether its owner set the model's mode."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_set = False


_holds: weakref.WeakKeyDictionary[nn.Module, _Hold] = weakref.WeakKeyDictionary()
_holds_guard = threading.Lock()


@contextmanager
def held(llm_attr: LLMAttributionObject) -> Iterator[None]:
    """The model in evaluation mode and ours alone; as it was, afterwards.

    Captum's gradient methods hook the model's layers, so two explanations of one model
    at the same time would mix. The second waits. That holds for calls of this package:
    it knows nothing of others, such as a plain ``generate`` in another thread.
    """
    model = llm_attr.model
    if not isinstance(model, nn.Module):  # the placeholder of a remote model
        yield
        return
    with _holds_guard:
        hold = _holds.setdefault(model, _Hold())
    with hold.lock:
        if hold.is_set:  # by a call that made this one
            yield
            return
        try:
            hold.is_set = True
            with evaluated(model):
                yield
        finally:
            hold.is_set = False


def check_model(llm_attr: LLMAttributionObject) -> None:
    """Refuse models that the method does not apply to.

    Raises:
        ValueError: if the model is an encoder-decoder.
    """
    config = getattr(llm_attr.model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            complaint(
                "llm_attr",
                "the model must be a decoder, which reads prompt and generated text as "
                "one sequence",
                f"{type(llm_attr.model).__name__} came, an encoder-decoder",
                "Use a causal language model.",
            )
        )


def context_length(model: Any) -> int | None:
    """Longest sequence of ids that the model takes; None if its config does not say."""
    config = text_config(model)
    for name in _LENGTHS:
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def check_sequence(
    llm_attr: LLMAttributionObject, prompt: Sequence[int], generated: Sequence[int]
) -> None:
    """Refuse ids that the model does not know, and sequences too long for it.

    Raises:
        ValueError: if an id is out of the vocabulary, or there are too many.
    """
    model = llm_attr.model
    vocabulary = _vocabulary_size(model, llm_attr.tokenizer)
    for where, ids in (("inp", prompt), ("target", generated)):
        for place, number in enumerate(ids):
            # Below zero: placeholders that multimodal processors put into prompts.
            if number >= vocabulary or (number < 0 and where == "target"):
                raise ValueError(
                    complaint(
                        where,
                        f"its ids must be in the vocabulary of {vocabulary} tokens",
                        f"id {number} came at position {place}",
                        "Use the tokenizer that belongs to the model.",
                    )
                )
    longest = context_length(model)
    length = len(prompt) + len(generated)
    if longest is not None and length > longest:
        rest = f" and target {len(generated)}" if generated else ""
        raise ValueError(
            complaint(
                "inp",
                f"prompt and target must fit into the model's context of {longest} "
                "tokens",
                f"the prompt has {len(prompt)}{rest}",
                "Shorten them, or load a model with a longer context.",
            )
        )


def check_baseline(llm_attr: LLMAttributionObject, baseline: int) -> None:
    """Refuse a baseline token that the model does not know.

    Raises:
        ValueError: if its id is out of the vocabulary.
    """
    vocabulary = _vocabulary_size(llm_attr.model, llm_attr.tokenizer)
    if not 0 <= baseline < vocabulary:
        raise ValueError(
            complaint(
                "generated_baseline",
                f"must be in the vocabulary of {vocabulary} tokens",
                f"id {baseline} came",
                "Pass the id of a token, for example tokenizer.eos_token_id.",
            )
        )


def _vocabulary_size(model: Any, tokenizer: Any) -> int:
    embeddings = getattr(model, "get_input_embeddings", None)
    if callable(embeddings):
        size = getattr(embeddings(), "num_embeddings", None)
        if isinstance(size, int):
            return size
    return len(tokenizer)


def generate_ids(
    llm_attr: LLMAttributionObject,
    prompt: Prompt,
    gen_args: Mapping[str, Any] | None,
) -> list[int]:
    """Ids that the model generates after a prompt or trace, special tokens included.

    Args:
        llm_attr: the wrapped object, whose model or provider generates.
        prompt (Prompt): the prompt.
        gen_args (Mapping, optional): for the model's ``generate``; Captum's own
            defaults if None: greedy, 25 tokens.

    Raises:
        TypeError: if the model cannot generate.
        ValueError: if nothing was generated.
    """
    arguments = dict(DEFAULT_GEN_ARGS if gen_args is None else gen_args)
    before = prompt.continuation.ids if prompt.continuation is not None else ()
    if family(llm_attr) == "remote":
        text = text_before(
            prompt.inp.to_model_input(), prompt, before, [], llm_attr.tokenizer
        )
        answer = llm_attr.provider.generate(text, **arguments)
        generated = llm_attr.tokenizer.encode(answer, add_special_tokens=False)
    else:
        model: Any = llm_attr.model
        if not callable(getattr(model, "generate", None)):
            raise TypeError(
                complaint(
                    "target",
                    "must be given for a model that cannot generate",
                    f"{type(model).__name__} came, which has no generate()",
                    "Pass the text or the ids to explain.",
                )
            )
        generated = continued_ids(
            llm_attr, prompt.inp.to_model_input(), before, arguments
        )
    if not generated:
        raise ValueError(
            "target: the model generated nothing after this prompt. Pass gen_args that "
            "let it write more, or the text to explain as target."
        )
    return token_ids("target", generated)


def most_new_tokens(
    llm_attr: LLMAttributionObject,
    prompt: Prompt,
    gen_args: Mapping[str, Any] | None,
) -> int:
    """How many tokens the model would generate at most.

    Args:
        llm_attr: the wrapped object, whose model or provider generates.
        prompt (Prompt): the prompt.
        gen_args (Mapping, optional): for the model's ``generate``; Captum's own
            defaults if None: greedy, 25 tokens.
    """
    before = len(prompt.ids)
    if prompt.continuation is not None:
        before += len(prompt.continuation.ids)
    arguments = dict(DEFAULT_GEN_ARGS if gen_args is None else gen_args)
    settings = getattr(llm_attr.model, "generation_config", None)
    new, whole = arguments.get("max_new_tokens"), arguments.get("max_length")
    if new is None and whole is None:
        new = getattr(settings, "max_new_tokens", None)
        whole = getattr(settings, "max_length", None) or _MAX_LENGTH
    most = int(whole or 0) - before if new is None else int(new)
    context = context_length(llm_attr.model)
    return max(1, most if context is None else min(most, context - before))


def _model_inputs(
    llm_attr: LLMAttributionObject, model_input: Any, more: Sequence[int]
) -> dict[str, Any]:
    """Keyword arguments of the model's forward for an input and more ids after it."""
    later = torch.tensor([list(more)], dtype=torch.long)
    if isinstance(model_input, Mapping):
        inputs = extended_model_input(model_input, later)
    else:
        ids = model_input
        if isinstance(ids, str):
            ids = torch.tensor([llm_attr.tokenizer.encode(ids)], dtype=torch.long)
        ids = torch.cat([ids, later.to(ids.device)], dim=1)
        inputs = {"input_ids": ids.to(llm_attr.device)}
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return inputs


def continued_ids(
    llm_attr: LLMAttributionObject,
    model_input: Any,
    more: Sequence[int],
    gen_args: Mapping[str, Any],
) -> list[int]:
    """Ids that a model generates after an input and more ids.

    Args:
        llm_attr: the wrapped object, whose model generates.
        model_input (str or Tensor or Mapping): what an interpretable input gives.
        more (Sequence[int]): ids after it.
        gen_args (Mapping): for the model's ``generate``.
    """
    model: Any = llm_attr.model
    inputs = _model_inputs(llm_attr, model_input, more)
    output = model.generate(**inputs, **gen_args)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    found: list[int] = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return found


def _states_after(
    llm_attr: LLMAttributionObject, model_input: Any, more: Sequence[int], last: int
) -> tuple[CausalModel, Tensor]:
    """The model, and its states at the last positions of an input and more ids."""
    inputs = _model_inputs(llm_attr, model_input, more)
    length = inputs["input_ids"].shape[1]
    model = CausalModel(llm_attr.model, llm_attr.device)
    keep = torch.arange(length - last, length)
    return model, model.states(inputs, keep, direct=True)[0]


def scores_after(
    llm_attr: LLMAttributionObject, model_input: Any, target: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Log-probability of each token of a text after an input, by one plain pass.

    Args:
        llm_attr: the wrapped object.
        model_input (str or Tensor or Mapping): what an interpretable input gives.
        target (Sequence[int]): ids of the text.

    Returns:
        numpy.ndarray: shape ``(len(target),)``, float64.
    """
    with torch.no_grad():
        model, states = _states_after(llm_attr, model_input, target, len(target) + 1)
        found = model.log_probabilities(states[:-1], torch.tensor(list(target)))
    scores: npt.NDArray[np.float64] = found.clamp(max=0).double().cpu().numpy()
    return scores


def next_token_probabilities(
    llm_attr: LLMAttributionObject, prompt: Prompt, generated: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Probability of every token of the vocabulary after a text.

    Returns:
        numpy.ndarray: shape ``(vocabulary,)``, float64.

    Raises:
        TypeError: if the model is remote.
    """
    if family(llm_attr) == "remote":
        raise TypeError(
            complaint(
                "alternatives",
                "needs the model itself",
                "the model is remote and scores given texts only",
                "Load the model.",
            )
        )
    with torch.no_grad():
        model, states = _states_after(
            llm_attr, prompt.inp.to_model_input(), generated, 1
        )
        found = model.probabilities(states)[0]
    probabilities: npt.NDArray[np.float64] = found.cpu().numpy()
    return probabilities


def log_probabilities(
    llm_attr: LLMAttributionObject, prompt: Prompt, generated: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Log-probability of each generated token given everything before it.

    One plain forward pass; for a remote model one request for the whole text.

    Returns:
        numpy.ndarray: shape ``(len(generated),)``, float64.

    Raises:
        ValueError: if the model gives a number that is no log-probability.
    """
    if family(llm_attr) == "remote":
        tokenizer = llm_attr.tokenizer
        given = llm_attr.provider.get_logprobs(
            input_prompt=text_before(
                prompt.inp.to_model_input(), prompt, [], generated, tokenizer
            ),
            target_str=decode(generated, tokenizer),
            tokenizer=tokenizer,
        )
        if len(given) != len(generated):
            raise ValueError(
                complaint(
                    "target",
                    f"the provider must score its {len(generated)} tokens",
                    f"{len(given)} scores came",
                    "Check that the provider's model uses this tokenizer.",
                )
            )
        values = np.asarray(given, dtype=np.float64)
    else:
        values = scores_after(llm_attr, prompt.inp.to_model_input(), generated)
    check_scores(values, generated, llm_attr.tokenizer)
    return values
