"""The demo model's problems as examples of known truth."""

from __future__ import annotations

from captum_cage.demo.problems import sample_problems
from captum_cage.metrics.datasets import Example

__all__ = ["examples"]


def examples(
    n: int, seed: int = 0, kind: str = "two_questions", *, split: str = "held_out"
) -> tuple[Example, ...]:
    """Examples of known truth for the demo model, the same for the same arguments.

    One for each answer: of a problem with two questions come two. Explained is the
    sentence of the answer; known to matter are the facts that it depends on, through
    any number of steps; taken away may be facts, not questions.

    Args:
        n (int): number of problems.
        seed (int, optional): of the draw. Default: ``0``
        kind (str, optional): as in :func:`sample_problems`.
            Default: ``"two_questions"``
        split (str, optional): as in :func:`sample_problems`. Default: ``"held_out"``

    Raises:
        ValueError: as :func:`sample_problems` does.

    Example:
        >>> one, other = examples(1)
        >>> one.explain[:19], other.explain[:20]
        ('The first answer is', 'The second answer is')
    """
    return tuple(
        Example(
            problem.prompt,
            problem.completion,
            answer.text,
            answer.facts,
            problem.facts,
            answer.text,
            kind=problem.kind,
        )
        for problem in sample_problems(n, seed, kind, split=split)
        for answer in problem.answers
    )
