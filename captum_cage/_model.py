"""What a transformers model says about itself."""

from __future__ import annotations

from typing import Any

__all__ = ["text_config"]


def text_config(model: Any) -> Any:
    """Config of the part of a model that reads text; None if it has none."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        return config.get_text_config()
    return config
