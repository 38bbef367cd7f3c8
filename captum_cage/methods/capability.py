"""What a base method takes, needs and costs, declared in one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Capability", "Wrapper"]

Wrapper: TypeAlias = Literal["perturbation", "gradient"]
"""The Captum object that takes a method."""


@dataclass(frozen=True)
class Capability:
    """What a base method takes, needs and costs.

    Attributes:
        name (str): its name on the command line.
        summary (str): what it measures, in one line.
        source (str): the paper.
        wrapper (str): the Captum object that takes it: ``"perturbation"`` for
            ``LLMAttribution``, ``"gradient"`` for ``LLMGradientAttribution``.
        cost (str): passes through the model for all rows, by the engine where there is
            one.
        needs (tuple[str, ...]): what it cannot do without, besides a causal model:
            packages, access to attention, another model.
        tokens_only (bool): whether it must know the tokens of each unit, so that
            templates and images are refused.
        remote (bool): whether it works with a remote model.
        random (bool): whether it samples.
        signed (bool): whether it tells what argues against a token.
        probabilities (bool): whether it can attribute probabilities, where
            ``attr_target="prob"``.
        depends_on_target (bool): whether its rows depend on which token was written,
            so that the rows of another token differ.
        counted (str or None): the argument that says how many evaluations it takes.
        extra (str or None): the extra of this package that it needs.
    """

    name: str
    summary: str
    source: str
    wrapper: Wrapper
    cost: str
    needs: tuple[str, ...] = ()
    tokens_only: bool = True
    remote: bool = False
    random: bool = False
    signed: bool = True
    probabilities: bool = False
    depends_on_target: bool = True
    counted: str | None = None
    extra: str | None = None
