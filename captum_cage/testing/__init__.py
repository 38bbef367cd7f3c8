"""What a downstream library calls from its own tests.

:mod:`captum_cage.testing.strategies` has Hypothesis strategies.
"""

from captum_cage.testing.engines import ENGINE_LAWS, EngineReport, check_engine
from captum_cage.testing.graphs import random_graph
from captum_cage.testing.methods import METHOD_LAWS, check_attribution_method
from captum_cage.testing.models import tiny_causal_lm
from captum_cage.testing.report import Finding, LawReport, LawsBroken
from captum_cage.testing.results import RESULT_LAWS, check_result
from captum_cage.testing.tokenizers import tiny_tokenizer

__all__ = [
    "ENGINE_LAWS",
    "METHOD_LAWS",
    "RESULT_LAWS",
    "EngineReport",
    "Finding",
    "LawReport",
    "LawsBroken",
    "check_attribution_method",
    "check_engine",
    "check_result",
    "random_graph",
    "tiny_causal_lm",
    "tiny_tokenizer",
]
