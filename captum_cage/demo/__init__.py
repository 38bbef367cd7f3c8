"""A small trained model and word problems whose reasoning is known."""

from captum_cage.demo.examples import examples
from captum_cage.demo.model import load_demo
from captum_cage.demo.problems import Answer, Problem, Step, sample_problems

__all__ = ["Answer", "Problem", "Step", "examples", "load_demo", "sample_problems"]
