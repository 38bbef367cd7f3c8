"""The package of batches: what it promises."""

from captum_cage import batch
from captum_cage.batch.run import BACKENDS


def test_it_exports_what_a_user_needs():
    """The function has the name of its module, and stands before it."""
    assert set(batch.__all__) == {
        *("BatchReport", "Example", "Explained", "Failure", "RayCluster"),
        *("results", "run"),
    }
    assert callable(batch.run)
    assert {*BACKENDS} == {"local", "ray"}
