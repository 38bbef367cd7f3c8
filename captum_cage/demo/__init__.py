"""A small trained model, and problems and conversations whose reasoning is known."""

from captum_cage.demo.conversations import (
    Conversation,
    Source,
    Statement,
    sample_conversations,
)
from captum_cage.demo.examples import examples
from captum_cage.demo.model import load_demo
from captum_cage.demo.problems import Answer, Problem, Step, sample_problems

__all__ = [
    "Answer",
    "Conversation",
    "Problem",
    "Source",
    "Statement",
    "Step",
    "examples",
    "load_demo",
    "sample_conversations",
    "sample_problems",
]
