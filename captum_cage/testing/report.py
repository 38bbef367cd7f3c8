"""What a check found out: each law with a verdict, in one readable report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import TextWrapper
from typing import Any, Literal, TypeAlias, TypeVar

from captum_cage._checks import complaint

__all__ = [
    "Broken",
    "Finding",
    "LawReport",
    "LawsBroken",
    "NotApplicable",
    "Verdict",
    "chosen_laws",
    "judged",
]

Verdict: TypeAlias = Literal["pass", "broken", "not applicable"]
_TrialT = TypeVar("_TrialT")
_WIDTH = 88
_INDENT = "    "


class Broken(Exception):
    """A law is broken: what was expected, what came, where, and what to do."""

    def __init__(self, expected: str, came: str, remedy: str, where: str = "") -> None:
        super().__init__(f"expected {expected}; came {came}")
        self.expected, self.came, self.remedy = expected, came, remedy
        self.where = where


class NotApplicable(Exception):
    """A law has nothing to say here; the message says why."""


@dataclass(frozen=True)
class Finding:
    """What was found out about one law.

    Attributes:
        law (str): its name.
        verdict (str): ``"pass"``, ``"broken"`` or ``"not applicable"``.
        reason (str): why it is not applicable, else empty.
        expected (str): what must hold, of a broken law.
        came (str): what was found instead.
        where (str): model and tokenizer, row and unit.
        remedy (str): what to do.
    """

    law: str
    verdict: Verdict
    reason: str = ""
    expected: str = ""
    came: str = ""
    where: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        head = f"  {self.law:<28} {self.verdict}"
        if self.verdict == "not applicable":
            head += f": {self.reason}"
        lines = TextWrapper(_WIDTH, subsequent_indent=" " * 31).wrap(head)
        for name in ("where", "expected", "came", "remedy"):
            text = getattr(self, name)
            if text:
                label = f"{'what to do' if name == 'remedy' else name}: "
                lines += _wrapped(label, text)
        return "\n".join(lines)


@dataclass(frozen=True)
class LawReport:
    """Every law that was looked at, with its verdict. Its text is the report.

    Attributes:
        subject (str): what was checked, as ``"check_engine: ABLATION"``.
        findings (tuple[Finding, ...]): one per law, in the order of the laws.
    """

    subject: str
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The laws that are broken."""
        return tuple(f for f in self.findings if f.verdict == "broken")

    def verdict(self, law: str) -> Verdict:
        """The verdict about one law.

        Args:
            law (str): its name.

        Raises:
            ValueError: if it was not looked at.
        """
        for finding in self.findings:
            if finding.law == law:
                return finding.verdict
        names = ", ".join(repr(finding.law) for finding in self.findings)
        raise ValueError(
            complaint(
                "law",
                f"must be one that was looked at: {names}",
                f"{law!r} came",
                "Pass one of these.",
            )
        )

    def __str__(self) -> str:
        count, total = len(self.broken), len(self.findings)
        laws = "1 law" if total == 1 else f"{total} laws"
        if count == 0:
            text = "none broken"
        else:
            text = "it is broken" if total == 1 else f"{count} broken"
        # What is broken stands in front.
        ordered = sorted(self.findings, key=lambda f: f.verdict != "broken")
        return "\n".join([f"{self.subject}: {laws}, {text}", *map(str, ordered)])


class LawsBroken(AssertionError):
    """Laws are broken. Its text is the report.

    Attributes:
        report (LawReport): all laws that were looked at.
    """

    def __init__(self, report: LawReport) -> None:
        super().__init__(str(report))
        self.report = report


def chosen_laws(names: Iterable[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """The laws to look at, in the order in which they are known.

    Args:
        names (Iterable[str] or None): names of laws; None for all.
        known (Sequence[str]): all of them.

    Raises:
        TypeError: if a text came instead of several.
        ValueError: if there is no such law, or none was asked for.
    """
    if names is None:
        return tuple(known)
    remedy = f"Pass some of {list(known)}, or None for all."
    if isinstance(names, str):
        raise TypeError(
            complaint("laws", "must be several names", f"{names!r} came", remedy)
        )
    asked = list(names)
    for name in asked:
        if name not in known:
            raise ValueError(
                complaint("laws", "must be names of laws", f"{name!r} came", remedy)
            )
    if not asked:
        raise ValueError(complaint("laws", "must name a law", "none came", remedy))
    return tuple(name for name in known if name in asked)


def judged(
    subject: str,
    laws: Mapping[str, Callable[[_TrialT], None]],
    trials: Sequence[tuple[str, _TrialT]],
) -> LawReport:
    """The report about laws, each of which was looked at in every trial.

    Args:
        subject (str): what is checked.
        laws (Mapping): functions of a trial that raise :class:`Broken` or
            :class:`NotApplicable`, by the law's name.
        trials (Sequence): where to look: name and trial.

    Raises:
        LawsBroken: if a law is broken in a trial.
    """
    findings, cause = [], None
    for name, law in laws.items():
        finding, error = _found(name, law, trials)
        findings.append(finding)
        cause = cause or error
    report = LawReport(subject, tuple(findings))
    if report.broken:
        raise LawsBroken(report) from cause
    return report


def _found(
    name: str, law: Callable[[Any], None], trials: Sequence[tuple[str, Any]]
) -> tuple[Finding, BaseException | None]:
    """The first trial that breaks a law; else whether it applies in any."""
    reason, passes = "", False
    for case, trial in trials:
        finding, error = _tried(name, law, case, trial)
        if finding.verdict == "broken":
            return finding, error
        passes = passes or finding.verdict == "pass"
        reason = reason or finding.reason
    if passes:
        return Finding(name, "pass"), None
    return Finding(name, "not applicable", reason), None


def _tried(
    name: str, law: Callable[[Any], None], case: str, trial: Any
) -> tuple[Finding, BaseException | None]:
    """One law in one trial, and the error that broke it."""
    try:
        law(trial)
    except NotApplicable as error:
        return Finding(name, "not applicable", str(error)), None
    except Broken as error:
        where = ", ".join(part for part in (case, error.where) if part)
        finding = Finding(
            name, "broken", "", error.expected, error.came, where, error.remedy
        )
        return finding, error.__cause__
    # Whatever the code of others raises is a finding about it.
    except Exception as error:  # noqa: BLE001
        finding = Finding(
            name,
            "broken",
            expected="no error",
            came=f"{type(error).__name__}: {error}",
            where=case,
            remedy="The traceback above this report shows where it was raised.",
        )
        return finding, error
    return Finding(name, "pass"), None


def _wrapped(label: str, text: str) -> list[str]:
    """Lines of a text under a label; lines that are broken already stay so."""
    first, *more = text.splitlines() or [""]
    deeper = _INDENT + " " * 12
    wrapper = TextWrapper(
        _WIDTH,
        initial_indent=f"{_INDENT}{label:<12}",
        subsequent_indent=deeper,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [*wrapper.wrap(first), *(deeper + line for line in more)]
