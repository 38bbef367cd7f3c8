"""Explain generated text through the text generated before it, on top of Captum."""

from captum_cage._version import __version__
from captum_cage.attribution import GraphContextAttribution
from captum_cage.engines import register_engine
from captum_cage.graph import AttributionGraph
from captum_cage.inputs import ChatTokenInput, TokenIdsInput
from captum_cage.result import GraphAttributionResult, TextPath
from captum_cage.thinking import Part
from captum_cage.traces import ChatTraceInput, TraceIdsInput
from captum_cage.units import Unit

__all__ = [
    "AttributionGraph",
    "ChatTokenInput",
    "ChatTraceInput",
    "GraphAttributionResult",
    "GraphContextAttribution",
    "Part",
    "TextPath",
    "TokenIdsInput",
    "TraceIdsInput",
    "Unit",
    "__version__",
    "register_engine",
]
