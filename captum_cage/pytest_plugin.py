"""Fixtures for the tests of other libraries: small models that tests must not change.

Pytest finds it where this package is installed. It imports nothing large before a test
asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["tiny_causal_lm", "tiny_tokenizer"]


class _Shelf:
    """What was made in a session, each thing as it was when it was made."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Any, Any]] = {}

    def given(
        self, key: Any, make: Callable[[], Any], picture: Callable[[Any], Any]
    ) -> Any:
        """The thing itself; it is made once."""
        if key not in self._made:
            value = make()
            self._made[key] = value, picture(value)
        return self._made[key][0]

    def changed(self, key: Any, picture: Callable[[Any], Any]) -> list[str]:
        """What is not as it was; such a thing is forgotten, the next test gets anew."""
        from captum_cage.testing.watch import changes  # noqa: PLC0415 (it brings torch)

        value, before = self._made[key]
        found: list[str] = changes(before, picture(value))
        if found:
            del self._made[key]
        return found


@pytest.fixture(scope="session")
def _captum_cage_shelf() -> _Shelf:
    """Models and tokenizers of this session."""
    return _Shelf()


def _key(
    make: Callable[..., Any], name: str, options: dict[str, Any]
) -> tuple[Any, ...]:
    parameters = signature(make).parameters
    # An option that is the default makes no other model.
    options = {
        key: value
        for key, value in options.items()
        if key not in parameters or parameters[key].default != value
    }
    return (name, *sorted((key, repr(value)) for key, value in options.items()))


def _verify(
    shelf: _Shelf, used: dict[Any, str], picture: Callable[[Any], Any], copy: str
) -> None:
    """Fail the test that changed what others use."""
    texts = []
    for key, call in used.items():
        found = shelf.changed(key, picture)
        if found:
            texts.append("\n  ".join([f"{call} was changed by this test:", *found]))
    if texts:
        remedy = f"Put it back, or make one of your own: {copy}."
        texts.append(f"Other tests share it. {remedy}")
        pytest.fail("\n".join(texts), pytrace=False)


@pytest.fixture
def tiny_causal_lm(
    _captum_cage_shelf: _Shelf,
) -> Iterator[Callable[..., PreTrainedModel]]:
    """``captum_cage.testing.tiny_causal_lm``, which makes each model once per session.

    A test that leaves a model changed fails: a weight, a gradient, a hook or the mode.
    A test that calls ``backward`` needs a model of its own.
    """
    from captum_cage.testing import tiny_causal_lm as make  # noqa: PLC0415
    from captum_cage.testing.watch import model_snapshot  # noqa: PLC0415

    used: dict[Any, str] = {}

    def made(arch: str = "llama", **options: Any) -> PreTrainedModel:
        key = _key(make, f"model {arch}", options)
        used[key] = _call("tiny_causal_lm", arch, options)
        model: PreTrainedModel = _captum_cage_shelf.given(
            key, lambda: make(arch, **options), model_snapshot
        )
        return model

    yield made
    _verify(
        _captum_cage_shelf, used, model_snapshot, "captum_cage.testing.tiny_causal_lm()"
    )


@pytest.fixture
def tiny_tokenizer(
    _captum_cage_shelf: _Shelf,
) -> Iterator[Callable[..., PreTrainedTokenizerFast]]:
    """``captum_cage.testing.tiny_tokenizer``, which makes each once per session.

    A test that leaves a tokenizer changed fails: added tokens, padding side, template.
    """
    from captum_cage.testing import tiny_tokenizer as make  # noqa: PLC0415
    from captum_cage.testing.watch import tokenizer_snapshot  # noqa: PLC0415

    used: dict[Any, str] = {}

    def made(kind: str = "bpe", **options: Any) -> PreTrainedTokenizerFast:
        key = _key(make, f"tokenizer {kind}", options)
        used[key] = _call("tiny_tokenizer", kind, options)
        tokenizer: PreTrainedTokenizerFast = _captum_cage_shelf.given(
            key, lambda: make(kind, **options), tokenizer_snapshot
        )
        return tokenizer

    yield made
    _verify(
        _captum_cage_shelf,
        used,
        tokenizer_snapshot,
        "captum_cage.testing.tiny_tokenizer()",
    )


def _call(name: str, first: str, options: dict[str, Any]) -> str:
    more = [f"{key}={value!r}" for key, value in options.items()]
    return f"{name}({', '.join([repr(first), *more])})"
