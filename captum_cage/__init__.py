"""Explain generated text through the text generated before it, on top of Captum."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captum_cage._version import __version__

if TYPE_CHECKING:
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

# Where each name is imported from at its first use: a plugin of pytest or a command
# that needs no model does not wait for Torch.
_HOMES = {
    "AttributionGraph": "graph",
    "ChatTokenInput": "inputs",
    "ChatTraceInput": "traces",
    "GraphAttributionResult": "result",
    "GraphContextAttribution": "attribution",
    "Part": "thinking",
    "TextPath": "result",
    "TokenIdsInput": "inputs",
    "TraceIdsInput": "traces",
    "Unit": "units",
    "register_engine": "engines",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name.isidentifier() and not name.startswith("_"):
        module = f"{__name__}.{name}"
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name[:2] == "__")})
