"""What a contrastive question is about: this and not that."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Alternative", "Foil"]


@dataclass(frozen=True)
class Foil:
    """What was written, and what is asked about in its place.

    Attributes:
        unit (int): position of the generated unit whose row is contrastive.
        target (str): what the model wrote there.
        text (str): the foil.
    """

    unit: int
    target: str
    text: str

    def __str__(self) -> str:
        return f"{self.target.strip()!r} rather than {self.text.strip()!r}"


@dataclass(frozen=True)
class Alternative:
    """A token that the model might write at a place.

    Attributes:
        id (int): its id, which ``foil=`` takes.
        text (str): its text there.
        probability (float): the model's, in [0, 1].
        written (bool): whether it is what was written.
    """

    id: int
    text: str
    probability: float
    written: bool
