"""What the folder of metrics offers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from captum_cage import metrics


def test_it_offers_what_its_modules_offer():
    """All public names of each module, each once, and no others."""
    modules = sorted(path.stem for path in Path(metrics.__file__).parent.glob("*.py"))
    offered = [
        name
        for module in modules
        if module != "__init__"
        for name in import_module(f"captum_cage.metrics.{module}").__all__
    ]
    assert sorted(metrics.__all__) == sorted(offered)
