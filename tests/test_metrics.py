"""What the folder of metrics offers."""

from __future__ import annotations

import pytest

from captum_cage import metrics


@pytest.mark.parametrize("name", metrics.__all__)
def test_what_it_offers_is_there_and_says_what_it_is(name):
    """Each name has a docstring; the modules have tests of their own."""
    offered = getattr(metrics, name)
    assert isinstance(offered, dict) or offered.__doc__
