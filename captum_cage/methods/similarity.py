"""Models that give text and no probabilities, for methods that perturb."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias

from captum.attr import RemoteLLMProvider

from captum_cage._captum import DEFAULT_GEN_ARGS
from captum_cage._checks import complaint, shown, whole_number

__all__ = ["TextSimilarityProvider"]

Generate: TypeAlias = Callable[[str], str]
"""Gives the text that a model writes after a prompt."""
Similarity: TypeAlias = Callable[[str, str], float]
"""How much a text is like the target, from 0 to 1."""

# What a similarity may exceed its range by, as cosines of float32 vectors do.
_ROUNDING = 1e-6


class TextSimilarityProvider(RemoteLLMProvider):
    """How much of a text a model writes again, in place of the text's probability.

    A provider for Captum's ``RemoteLLMAttribution``, and so for every method that
    perturbs. Where the probability of a target after a text is asked for, the model
    writes a continuation of the text, and the probability is the similarity of that to
    the target; its logarithm is spread evenly over the target's tokens. With
    ``attr_target="prob"`` the attributed value is the similarity itself.

    A model writes on when the target is complete. So only the beginning of what it
    writes is compared, as many characters as the target has: the target itself has
    similarity 1 to a text that begins with it, whatever follows.

    Args:
        generate (Callable): given a prompt, the text that the model writes after it.
            It should write at least as much as the longest unit, and the same again
            for the same prompt. Each prompt is asked for once.
        similarity (Callable): given a text and the target, how similar they are, from
            0 to 1.
        cut (bool, optional): compare as many characters as the target has; else all
            that was written. Default: ``True``
        floor (float, optional): smallest similarity, so that logarithms are finite.
            Default: ``1e-6``
        cache_size (int, optional): number of prompts whose texts are kept.
            Default: ``1024``

    Raises:
        TypeError: if a function cannot be called.
        ValueError: if the floor is not between 0 and 1, or the size below 1.

    Source: the text-only setting of Monteiro Paes et al. (2024),
    :cite:p:`paes2024mexgen`.

    Example:
        >>> from captum.attr import FeatureAblation, RemoteLLMAttribution
        >>> from captum.attr import TextTemplateInput
        >>> from captum_cage import GraphContextAttribution
        >>> from captum_cage.demo import load_demo
        >>> _, tokenizer = load_demo()
        >>> def echo(prompt):
        ...     return " Ana" if "Ana" in prompt else " Mia"
        >>> provider = TextSimilarityProvider(echo, lambda one, other: one == other)
        >>> ablation = FeatureAblation(RemoteLLMAttribution.placeholder_model)
        >>> llm_attr = RemoteLLMAttribution(
        ...     ablation, tokenizer, provider, attr_target="prob"
        ... )
        >>> inp = TextTemplateInput("{} or{}?", ["Ana", " Mia"])
        >>> result = GraphContextAttribution(llm_attr).attribute(inp, " Ana")
        >>> result.graph.rows.round(3)
        array([[1., 0., 0.]])
    """

    def __init__(
        self,
        generate: Generate,
        similarity: Similarity,
        *,
        cut: bool = True,
        floor: float = 1e-6,
        cache_size: int = 1024,
    ) -> None:
        for where, function in (("generate", generate), ("similarity", similarity)):
            if not callable(function):
                raise TypeError(
                    complaint(
                        where,
                        "must be a function",
                        f"{shown(function)} came",
                        "Pass a function of texts.",
                    )
                )
        if not _is_number(floor) or not 0.0 < floor < 1.0:
            raise ValueError(
                complaint(
                    "floor",
                    "must be a similarity, more than 0 and less than 1",
                    f"{shown(floor)} came",
                    "Pass a small number, for example 1e-6.",
                )
            )
        remedy = "Pass the number of prompts whose texts are kept."
        self._size = whole_number("cache_size", cache_size, minimum=1, remedy=remedy)
        self._generate = generate
        self._similarity = similarity
        self._cut = cut
        self._floor = float(floor)
        self._written: OrderedDict[str, str] = OrderedDict()

    def generate(self, prompt: str, **gen_args: Any) -> str:
        """The text that the model writes after a prompt.

        Args:
            prompt (str): the prompt.
            **gen_args: none but Captum's defaults, which are not used: how a text is
                written is the function's matter.

        Raises:
            TypeError: if the function gives something else than text.
            ValueError: if there are arguments.
        """
        if gen_args and gen_args != DEFAULT_GEN_ARGS:
            raise ValueError(
                complaint(
                    "gen_args",
                    "must be left out, since a function of the prompt alone writes the "
                    "text",
                    f"{', '.join(gen_args)} came",
                    "Let the function that you passed as `generate` set them.",
                )
            )
        if prompt in self._written:
            self._written.move_to_end(prompt)
            return self._written[prompt]
        text = self._generate(prompt)
        if not isinstance(text, str):
            raise TypeError(
                complaint(
                    "generate",
                    "must give the text that the model writes",
                    f"{shown(text)} came",
                    "Return a string, without the prompt.",
                )
            )
        self._written[prompt] = text
        if len(self._written) > self._size:
            self._written.popitem(last=False)
        return text

    def get_logprobs(
        self, input_prompt: str, target_str: str, tokenizer: Any = None
    ) -> list[float]:
        """Logarithm of the target's similarity to what the model writes, in parts.

        Args:
            input_prompt (str): the text that the model continues.
            target_str (str): the target.
            tokenizer (optional): says how many tokens the target has. Default: one

        Returns:
            list[float]: equal parts, one per token of the target.

        Raises:
            TypeError: if the similarity is no number.
            ValueError: if it is NaN or out of its range.
        """
        text = self.generate(input_prompt)
        if self._cut:
            text = text[: len(target_str)]
        found = self._checked(self._similarity(text, target_str), target_str)
        count = 1
        if tokenizer is not None:
            count = len(tokenizer.encode(target_str, add_special_tokens=False))
        return [math.log(max(found, self._floor)) / count] * count

    def _checked(self, value: Any, target: str) -> float:
        found = value.item() if hasattr(value, "item") else value
        if not isinstance(found, Real):
            raise TypeError(
                complaint(
                    "similarity",
                    "must give a number",
                    f"{shown(value)} came for the target {target!r}",
                    "Return a float from 0 to 1.",
                )
            )
        number = float(found)
        if not -_ROUNDING <= number <= 1.0 + _ROUNDING:
            raise ValueError(
                complaint(
                    "similarity",
                    "must give a number from 0 to 1",
                    f"{number} came for the target {target!r}",
                    "Scale it: a cosine c becomes (1 + c) / 2.",
                )
            )
        return min(number, 1.0)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
