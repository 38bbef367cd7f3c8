"""What the folder of metrics offers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from captum_cage import metrics
from captum_cage.metrics import datasets


def test_it_offers_what_its_modules_offer():
    """Curves, truth, statistics and checks whole; of the others what a user calls."""
    modules = {
        path.stem: import_module(f"captum_cage.metrics.{path.stem}").__all__
        for path in Path(metrics.__file__).parent.glob("*.py")
        if path.stem != "__init__"
    }
    names = [name for offered in modules.values() for name in offered]
    assert len(set(names)) == len(names)
    assert set(metrics.__all__) <= set(names)
    for module in ("curves", "truth", "statistics", "sanity"):
        assert set(modules[module]) <= set(metrics.__all__), module


def test_data_sets_have_a_namespace_of_their_own():
    """Whose names are common words."""
    assert not set(datasets.__all__) & set(metrics.__all__)
