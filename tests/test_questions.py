"""Every question, with every base method, about every kind of input, in pairs.

Each runs, or gives the error that docs/how-to/questions.md names.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import RemoteLLMAttribution

from captum_cage import (
    GraphContextAttribution,
    Part,
    TokenIdsInput,
    TraceIdsInput,
)
from captum_cage.methods.catalogue import accepted_inputs, capabilities, llm_attribution
from test_methods_reagent import masked
from tiny import (
    LocalProvider,
    image_input,
    inputs_of_each_kind,
    tiny_model,
    tiny_tokenizer,
    tiny_vision_model,
)

TOKENIZER = tiny_tokenizer("bpe")
PROMPT = "Ana has 3"
ANSWER = TOKENIZER.encode(" pens. Mia")
KINDS = ("tokens", "tokens, some skipped", "ids in groups", "chat", "template, list")
WHOLE = ("template, list", "ids in groups", "image", "remote")  # features as they are
INPUTS = (*KINDS, "image", "remote", "trace")
METHODS = [declared.name for _, declared in capabilities()]


@pytest.fixture(scope="module")
def models():
    """A text model and one that reads images."""
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    return model, tiny_vision_model(len(TOKENIZER))


def in_two(text):
    """The first visible character's word, and the rest of the text."""
    first = len(text) - len(text.lstrip())
    cut = text.find(" ", first) + 1
    return [(first, cut), (cut, len(text))] if cut and cut < len(text) else []


def chosen(kind):
    """An input of a kind, and what the model writes after it."""
    if kind == "trace":
        ids = [*TOKENIZER.encode(PROMPT), *ANSWER, *TOKENIZER.encode(" has 4"), *ANSWER]
        count = len(TOKENIZER.encode(PROMPT))
        generated = np.zeros(len(ids), dtype=bool)
        generated[count : count + len(ANSWER)] = generated[-len(ANSWER) :] = True
        return TraceIdsInput(ids, TOKENIZER, generated), None
    if kind == "image":
        return image_input(TOKENIZER), ANSWER
    if kind == "ids in groups":
        ids = TOKENIZER.encode(PROMPT)
        groups = [i // 2 for i in range(len(ids))]
        return TokenIdsInput(ids, TOKENIZER, feature_mask=groups), ANSWER
    kind = "template, list" if kind == "remote" else kind
    return inputs_of_each_kind(TOKENIZER, PROMPT)[kind], ANSWER


def wrapped(declared, kind, models):
    """A base method in Captum's wrapper."""
    model = models[kind == "image"]
    options = {}
    if declared.name in ("reagent", "one-shot-reagent"):
        masked_lm, masked_tokenizer = masked("bert")
        options = {"masked_lm": masked_lm, "masked_tokenizer": masked_tokenizer}
    llm_attr = llm_attribution(declared.name, model, TOKENIZER, **options)
    if kind == "remote":
        provider = LocalProvider(model, TOKENIZER)
        method = type(llm_attr.attr_method)
        placeholder = RemoteLLMAttribution.placeholder_model
        return RemoteLLMAttribution(method(placeholder), TOKENIZER, provider)
    return llm_attr


def refused(kind, declared):
    """Why a method does not take this kind of input; None if it does."""
    kinds = accepted_inputs(declared)
    if kind.startswith("template") and "templates" not in kinds:
        return TypeError, r"needs a TextTokenInput|attributes to tokens"
    if kind == "image" and "images" not in kinds:
        return TypeError, r"needs a TextTokenInput|attributes to tokens"
    return None


def due(number, declared, kind):
    """Whether a question is asked here: of tokens always, elsewhere one in two is.

    So each is asked of every method, and about every kind of input by half of them.
    """
    place = METHODS.index(declared.name) + INPUTS.index(kind) + number
    return kind == "tokens" or place % 2 == 0


def cases():
    """Each method with each kind of input that it can be wrapped for."""
    for _, declared in capabilities():
        for kind in INPUTS:
            if kind != "remote" or "remote" in accepted_inputs(declared):
                yield pytest.param(declared, kind, id=f"{declared.name}, {kind}")


def assert_refined(coarse, kind):
    """Units that have mass and several tokens are divided, others are refused."""
    weights = zip(coarse.graph.source_units, coarse.seq_attr, strict=True)
    texts = [coarse.units[unit].text for unit, weight in weights if weight]
    # A sparse regression may give mass to single tokens only, or to none.
    if kind in WHOLE or all(len(TOKENIZER.encode(text)) == 1 for text in texts):
        with pytest.raises(ValueError, match="to: must divide a unit that has mass"):
            coarse.refine(to="token")
    else:
        assert len(coarse.refine(1, "token").units) > len(coarse.units)


@pytest.mark.parametrize(("declared", "kind"), list(cases()))
def test_every_question_is_answered_or_refused_by_name(declared, kind, models):
    """Why not, for and against, finer, real, sure, through the thoughts."""
    if declared.extra is not None:
        pytest.importorskip("sklearn")
    if (kind, declared.name) == ("image", "context-cite"):
        pytest.importorskip("sklearn")
    kwargs = {"n_samples": 2} if declared.counted == "n_samples" else {}
    if declared.counted == "n_steps":
        kwargs["n_steps"] = 2
    if declared.name == "reagent":
        kwargs["max_steps"] = 2
    llm_attr = wrapped(declared, kind, models)
    inp, target = chosen(kind)
    units = {"generated": "word"}
    if kind == "remote" and declared.name in ("lime", "kernel-shap"):
        units = {"generated": "sentence"}

    def ask(**question):
        cage = GraphContextAttribution(
            llm_attr, normalization=question.pop("normalization", "positive")
        )
        torch.manual_seed(0)
        return cage.attribute(inp, target, units=units, **question, **kwargs)

    why = refused(kind, declared)
    if why is not None:
        with pytest.raises(why[0], match=why[1]):
            ask()
        return
    if declared.name == "shapley":
        units = {"source": in_two, "generated": "sentence"}
    result = ask()

    # For and against.
    if due(0, declared, kind):
        signed = ask(normalization="signed")
        both = signed.positive_attr - signed.negative_attr
        assert torch.allclose(both, signed.seq_attr, atol=1e-9)
        assert not result.negative_attr.any()

    # Why this and not that.
    foil = {len(result.output_tokens) - 1: [TOKENIZER.encode(" 4")[-1]]}
    if not declared.depends_on_target:
        with pytest.raises(ValueError, match="rows must depend on what was written"):
            ask(foil=foil)
    elif due(1, declared, kind):
        contrasted = ask(foil=foil)
        assert contrasted.foils
        assert contrasted.explained == (len(result.output_tokens) - 1,)
        assert torch.isfinite(contrasted.seq_attr).all()

    # How sure.
    if not declared.random:
        with pytest.raises(ValueError, match="must be 1 for a method that does not"):
            ask(draws=2)
    elif due(2, declared, kind):
        found = ask(draws=2).intervals(resamples=4)
        assert (found.low <= found.high).all()

    # Through the thoughts.
    text = result.generated_text
    if due(3, declared, kind):
        thought = ask(think=(0, len(text) // 2), explain=Part.ANSWER)
        assert 0.0 <= thought.share_through() <= 1.0 + 1e-9

    # Finer units.
    coarse = result
    if kind not in WHOLE:
        units = {"source": in_two, "generated": "sentence"}
        coarse = ask(normalization="absolute") if due(4, declared, kind) else None
    if coarse is not None:
        assert_refined(coarse, kind)

    # What else, and is it real.
    if kind == "remote":
        with pytest.raises(TypeError, match="needs the model itself"):
            result.alternatives()
        with pytest.raises(TypeError, match="needs the model itself"):
            result.verify_path([len(result.units) - 1, 0])
        return
    assert len(result.alternatives(k=3)) == 3
    last = int(result.graph.generated_units[-1])
    check = result.verify_path([last, int(result.graph.source_units[0])])
    assert check.kind == "direct"
    assert np.isfinite([check.predicted, check.measured]).all()
