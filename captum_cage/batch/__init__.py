"""Many examples to a directory of results: resumable, shared by processes."""

from captum_cage.batch.directory import Failure
from captum_cage.batch.examples import Example
from captum_cage.batch.on_ray import RayCluster
from captum_cage.batch.run import BatchReport, Explained, results, run

__all__ = [
    "BatchReport",
    "Example",
    "Explained",
    "Failure",
    "RayCluster",
    "results",
    "run",
]
