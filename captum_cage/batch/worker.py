"""What one worker of a batch does: explain an example and keep what came of it."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import platform
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import transformers

from captum_cage._captum import CAPTUM_VERSION, base_method, check_kwargs
from captum_cage._checks import complaint, one_of, shown
from captum_cage._version import __version__
from captum_cage.attribution import STRATEGIES, GraphContextAttribution
from captum_cage.batch.directory import Directory, Failure
from captum_cage.batch.examples import Example, Given, digest
from captum_cage.methods.catalogue import is_random
from captum_cage.result import GraphAttributionResult
from captum_cage.spool import OtherRows
from captum_cage.units import split_units

__all__ = ["LOST_DEVICE", "Cage", "Job", "Outcome", "Worker", "failure_of", "versions"]

Cage: TypeAlias = "GraphContextAttribution | Callable[[], GraphContextAttribution]"
"""What explains, or a function without arguments that makes it."""

LOST_DEVICE: tuple[type[Exception], ...] = (
    (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
)
"""Errors after which a device answers nothing more in this process."""

_NO_MATTER = ("batch_size", "show_progress")  # options that change no result
_NOT_OURS = ("inp", "target", "spool", "self", "kwargs")
# A full or read-only disk is no fault of the example under way.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_SAID = ("multiplies_by_inputs",)  # properties of a method that change its rows
_SAMPLED = 64  # values of each weight that its fingerprint looks at


@dataclass(frozen=True)
class Job:
    """What all workers of a batch are told.

    Attributes:
        cage: the :class:`GraphContextAttribution`, or what makes it.
        out (Path): the directory of results.
        options (Mapping): of ``attribute``, for each example that says nothing else.
        seed (int): of the random methods.
        retry_failed (bool): whether examples with an error are tried again.
    """

    cage: Cage
    out: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    retry_failed: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of an example.

    Attributes:
        given (Given): the example.
        status (str): ``"done"``; ``"skipped"``: had its result; ``"failed"``;
            ``"busy"``: another process has it.
        failure (Failure or None): why it failed.
        seconds (float): how long it took.
    """

    given: Given
    status: str
    failure: Failure | None = None
    seconds: float = 0.0


class Worker:
    """Explains examples one after the other, with one model.

    Args:
        job (Job): what is to be done; its directory is there.

    Raises:
        TypeError: if ``cage`` is, or makes, something else, or an option is unknown.
        ValueError: if an option cannot be.
    """

    def __init__(self, job: Job) -> None:
        made = job.cage
        if not isinstance(made, GraphContextAttribution):
            if not callable(made):
                raise _no_cage(made)
            made = made()
            if not isinstance(made, GraphContextAttribution):
                raise _no_cage(made)
        self.cage = made
        self.job = job
        self.directory = Directory(job.out)
        self._began = time.time()
        _check_options(made, job.options)

    @property
    def settings(self) -> dict[str, Any]:
        """What every result of the directory shares, as JSON values."""
        return settings_of(self.cage, self.job.options, self.job.seed)

    def explain(self, given: Given, *, wait: bool = False) -> Outcome:
        """Explain an example and save the result, or its error.

        Args:
            given (Given): the example.
            wait (bool, optional): wait while another process has it.
                Default: ``False``

        Raises:
            OSError: if the directory cannot be written.
            ImportError: if the method lacks a package.
        """
        start = time.perf_counter()
        with self.directory.claim(given.key, wait=wait) as ours:
            if not ours:
                return Outcome(given, "busy")
            if self.directory.is_done(given.key):
                return Outcome(given, "skipped")
            failure = self.directory.failure(given.key)
            if failure is not None and not self._is_retried(given.key):
                return Outcome(given, "failed", failure)
            try:
                found = self.attribute(given, self.directory.spool(given.key))
            except LOST_DEVICE as error:
                # It ends the run; the next one is not to end here, too.
                self.directory.fail(failure_of(given, error))
                raise
            if isinstance(found, Failure):
                self.directory.fail(found)
                return Outcome(given, "failed", found, time.perf_counter() - start)
            self.directory.save(given.key, found)
        return Outcome(given, "done", seconds=time.perf_counter() - start)

    def _is_retried(self, key: str) -> bool:
        """Whether a failed example is tried again: not what failed in this run."""
        file = self.directory.error_file(key)
        return self.job.retry_failed and file.stat().st_mtime < self._began

    def attribute(
        self, given: Given, spool: Path | None
    ) -> GraphAttributionResult | Failure:
        """The result of an example, or why there is none; nothing is written but rows.

        Args:
            given (Given): the example.
            spool (Path, optional): a folder for the rows that are finished.

        Raises:
            OSError: if the disk is full or read-only.
            ImportError: if the method lacks a package.
        """
        example = given.example
        if example is None:
            raise ValueError(
                complaint("given", "must hold an example", "none came", "Record it.")
            )
        try:
            with seeded(self.job.seed, given.key):
                return self._result(example, spool)
        except ImportError:
            raise
        except LOST_DEVICE:
            raise
        except OSError as error:
            if error.errno in _DISK:
                raise
            return failure_of(given, error)
        except Exception as error:  # noqa: BLE001 (whatever a model or a server says)
            return failure_of(given, error)

    def _result(self, example: Example, spool: Path | None) -> GraphAttributionResult:
        # A copy, so that no example goes on from another one's rows.
        cage = copy(self.cage)
        inp = example.input(cage.llm_attr.tokenizer)
        asked = {**self.job.options, **example.arguments}
        if "target" in asked:
            asked.pop("gen_args", None)
        if is_random(type(cage.llm_attr.attr_method), inp):
            # Rows drawn before a kill and after it would be drawn from one seed.
            return cage.attribute(inp, **asked)
        try:
            return cage.attribute(inp, **asked, spool=spool)
        except OtherRows:  # damaged ones, or of other versions
            if spool is None:
                raise
            shutil.rmtree(spool)
        except BlockingIOError:
            # A worker whose driver is dead writes there until it finds that out.
            if spool is None:
                raise
            spool = None
        return copy(self.cage).attribute(inp, **asked, spool=spool)


def _no_cage(value: object) -> TypeError:
    return TypeError(
        complaint(
            "cage",
            "must be a GraphContextAttribution, or a function that makes one",
            f"{shown(value)} came",
            "Pass GraphContextAttribution(llm_attr).",
        )
    )


def failure_of(given: Given, error: BaseException) -> Failure:
    """An error, as it is kept."""
    trace = traceback.format_exception(error) if error.__traceback__ else []
    return Failure(
        key=given.key,
        type=type(error).__name__,
        message=str(error),
        position=given.position,
        line=given.line,
        id=given.id,
        traceback="".join(trace),
    )


# --- settings ------------------------------------------------------------------------


def _check_options(cage: GraphContextAttribution, options: Mapping[str, Any]) -> None:
    known = set(inspect.signature(cage.attribute).parameters)
    for name in ("inp", "target", "spool"):
        if name in options:
            raise TypeError(
                f"{name}: is not an option of a batch, since each example has its own. "
                "Leave it out."
            )
    check_kwargs(cage.llm_attr, {n: v for n, v in options.items() if n not in known})
    if "units" in options:
        split_units(options["units"])
    if "strategy" in options:
        one_of("strategy", options["strategy"], STRATEGIES)


def versions() -> dict[str, str]:
    """Versions of what makes results."""
    return {
        "captum_cage": __version__,
        "captum": CAPTUM_VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def settings_of(
    cage: GraphContextAttribution, options: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """What every result of a directory shares, as JSON values.

    Args:
        cage (GraphContextAttribution): what explains.
        options (Mapping): of ``attribute``.
        seed (int): of random methods.
    """
    llm_attr = cage.llm_attr
    method = llm_attr.attr_method
    own = vars(method)
    return {
        "attribution": type(llm_attr).__name__,
        "method": base_method(llm_attr),
        "quantity": str(getattr(llm_attr, "attr_target", "log_prob")),
        "method_settings": {
            name: said
            for name, value in sorted(own.items())
            if name[:1] != "_" and value is not getattr(llm_attr, "model", None)
            for said in [_of_method(value, llm_attr)]
            if said is not None
        }
        | {name: getattr(method, name) for name in _SAID if hasattr(method, name)},
        "model": _model_settings(llm_attr),
        "tokenizer": _tokenizer_settings(llm_attr.tokenizer),
        "normalization": cage.normalization,
        "generated_baseline": cage.generated_baseline,
        "options": {
            name: _plain(value)
            for name, value in sorted(options.items())
            if name not in _NO_MATTER
        },
        "seed": seed,
    }


def _of_method(value: Any, llm_attr: Any) -> Any:
    """What an attribute of a method says of its rows; None if that is not known."""
    if isinstance(value, str | int | float | bool):
        return _plain(value)
    if isinstance(value, list | tuple):
        return [_of_method(one, llm_attr) for one in value]
    if isinstance(value, torch.nn.Module):
        model = getattr(llm_attr, "model", None)
        names = model.named_modules() if isinstance(model, torch.nn.Module) else ()
        name = next((name for name, module in names if module is value), None)
        return _weights(value) if name is None else name  # a layer, or another model
    return None


def _plain(value: Any) -> Any:
    """A value as JSON holds it, or its hash."""
    try:
        found = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        found = None
    if found is None and value is not None:
        return {"hash": digest(value)}
    return found


def _model_settings(llm_attr: Any) -> dict[str, Any]:
    """A model's name, and fingerprints of its config and its weights."""
    model = getattr(llm_attr, "model", None)
    provider = getattr(llm_attr, "provider", None)
    config: Any = getattr(model, "config", None)
    found = {
        "class": type(model if provider is None else provider).__name__,
        "name": str(getattr(config, "name_or_path", "")),
    }
    for name in ("model_name", "api_url"):
        value = getattr(provider, name, None)
        if isinstance(value, str):
            found[name] = value
    if hasattr(config, "to_dict"):
        said = config.to_dict()
        # Where it was loaded from, and what saving it notes down.
        for name in ("_name_or_path", "architectures", "transformers_version"):
            said.pop(name, None)
        text = json.dumps(said, sort_keys=True, default=str)
        found["config"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    if isinstance(model, torch.nn.Module):
        found["weights"] = _weights(model)
    return found


def _weights(model: torch.nn.Module) -> str:
    """Hash of some values of each weight: cheap, and different after training."""
    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        if not isinstance(weight, torch.Tensor):
            continue
        said = f"{name} {tuple(weight.shape)} {weight.dtype}"
        found.update(said.encode())
        if weight.is_meta or weight.numel() == 0:
            continue
        step = max(1, weight.numel() // _SAMPLED)
        places = torch.arange(0, weight.numel(), step, device=weight.device)
        some = weight.detach().reshape(-1)[places]
        found.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _tokenizer_settings(tokenizer: Any) -> dict[str, str]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if hasattr(backend, "to_str") else ""
    if not text and hasattr(tokenizer, "get_vocab"):
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    text += str(getattr(tokenizer, "chat_template", ""))
    return {
        "class": type(tokenizer).__name__,
        "name": str(getattr(tokenizer, "name_or_path", "")),
        "hash": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16],
    }


# --- randomness ----------------------------------------------------------------------


@contextmanager
def seeded(seed: int, key: str) -> Iterator[None]:
    """Random numbers that depend on seed and example alone; the user's are kept.

    Args:
        seed: of the batch.
        key: hash of the example.
    """
    of_both = hashlib.sha256(f"{seed} {key}".encode()).digest()
    number = int.from_bytes(of_both[:4], "little")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    # The global generators: what a method draws from is not known.
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(number)
            np.random.seed(number)  # noqa: NPY002
            random.seed(number)
            yield
    finally:
        np.random.set_state(arrays)  # noqa: NPY002
        random.setstate(python)
