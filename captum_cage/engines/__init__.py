"""Raw rows of all generated units at once, one engine per family of base method."""

from captum_cage.engines.engine import Engine
from captum_cage.engines.registry import register_engine

__all__ = ["Engine", "register_engine"]
