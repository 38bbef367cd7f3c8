"""Raw rows of all generated units at once, one engine per family of base method."""

from captum_cage.engines.columns import scored_subsets, unsupported
from captum_cage.engines.engine import Engine, RowFunction, Unsuitable
from captum_cage.engines.registry import register_engine
from captum_cage.engines.sequences import Perturbation, SequenceScorer
from captum_cage.task import RowTask

__all__ = [
    "Engine",
    "Perturbation",
    "RowFunction",
    "RowTask",
    "SequenceScorer",
    "Unsuitable",
    "register_engine",
    "scored_subsets",
    "unsupported",
]
