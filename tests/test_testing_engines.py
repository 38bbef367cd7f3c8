"""The laws of engines: those of the package keep them, broken ones are told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LLMAttribution,
    ShapleyValues,
    ShapleyValueSampling,
    TextTokenInput,
)
from transformers import BertConfig, BertForMaskedLM

from captum_cage.engines import Engine
from captum_cage.engines.engine import Unsuitable
from captum_cage.engines.registry import _engines
from captum_cage.engines.tokens import TOKENS
from captum_cage.methods import OneShotReAGent
from captum_cage.methods.catalogue import capability_of
from captum_cage.rows import loop_row
from captum_cage.testing import (
    ENGINE_LAWS,
    LawsBroken,
    check_engine,
    tiny_tokenizer,
)

ONE = [("llama", "bpe")]


class Mine(FeatureAblation):
    """A downstream method."""


def by_the_loop(change):
    """An engine that changes the loop's rows by a function of row, task and step."""

    def rows(task, steps):
        for step in steps:
            yield change(loop_row(task, step), task, step)

    return rows


def own_unit(row, task, step):
    """A unit is attributed to itself."""
    row[len(task.sources) + step] = 1.0
    return row


def by_length(row, task, _):
    """What stands behind counts."""
    return row * len(task.generated)


def without_a_number(row, *_):
    """NaN."""
    row[1] = np.nan
    return row


def shifted(row, *_):
    """Another number."""
    row[0] += 1e-3
    return row


def in_batches(row, task, _):
    """The rows depend on the batch."""
    return row * 2 if task.batch_size == 1 else row


def of_tokens(row, task, _):
    """Units of several tokens are something else."""
    return row * 2 if len(task.steps) < len(task.generated) else row


def with_all_tokens(row, task, _):
    """Tokens of no unit are taken for some."""
    return row * 2 if (task.unit_of_token() < 0).any() else row


def kept_for_all(task, steps):
    """The rows of the first call answer every later one."""
    if "rows" not in task.kept:
        task.kept["rows"] = [loop_row(task, step) for step in steps]
    return [row for row, _ in zip(task.kept["rows"], steps, strict=False)]


def without_gradients(row, *_):
    """Gradients are switched off for whatever comes next."""
    torch.set_grad_enabled(False)
    return row


def in_training(row, task, _):
    """The mode is changed."""
    task.llm_attr.model.train()
    return row


def hooked(row, task, _):
    """A hook is left behind."""
    task.llm_attr.model.lm_head.register_forward_pre_hook(lambda *_: None)
    return row


def read_again(row, task, _):
    """The text is tokenised."""
    task.llm_attr.tokenizer.encode(task.generated_text.text)
    return row


def with_noise(row, *_):
    """A generator of its own."""
    return row * np.random.default_rng().random()


def seeded(row, *_):
    """NumPy is seeded."""
    np.random.seed(1)  # noqa: NPY002
    return row


def remembered(row, task, _):
    """The Captum object is given another attribute."""
    task.llm_attr.last = len(task.steps)
    return row


def backwards(task, steps):
    """All rows, the last one first."""
    return [loop_row(task, step) for step in reversed(steps)]


def all_of_them(task, _):
    """Whatever was asked for."""
    return [loop_row(task, step) for step in range(len(task.steps))]


def from_the_first(task, steps):
    """As many rows as were asked for, but the first ones."""
    return [loop_row(task, step) for step in range(len(steps))]


def fails(*_):
    """It cannot do it."""
    raise RuntimeError("no such layer")


def asks(task):
    """A model call, to find out."""
    task.llm_attr.model(torch.tensor([[1, 2]]))


BROKEN = {
    "an error": ("runs", fails, "RuntimeError: no such layer"),
    "a row too many": ("runs", lambda t, s: [*backwards(t, s), 0], "5 rows"),
    "a short row": ("shape", by_the_loop(lambda row, *_: row[:-1]), r"shape \(8,\)"),
    "NaN": ("finiteness", by_the_loop(without_a_number), r"row 0 .* unit 1 .*nan"),
    "itself": ("causality", by_the_loop(own_unit), r"unit 4 .*0 for a unit at or"),
    "the future": ("causality", by_the_loop(by_length), "when the text ends after"),
    "values": ("equality to the loop", by_the_loop(shifted), "the loop's row, "),
    "zeros": (
        "equality to the loop",
        by_the_loop(lambda row, *_: 0 * row),
        "off by 1 of the largest entry",
    ),
    "order": ("equality to the loop", backwards, "the loop's row"),
    "units": ("group then solve", by_the_loop(of_tokens), "units of two tokens"),
    "no unit": (
        "tokens of no unit",
        by_the_loop(with_all_tokens),
        "entry of task.unit",
    ),
    "kept rows": ("rows asked for", kept_for_all, r"steps=\[0\], after other steps"),
    "a setting": ("random state", by_the_loop(without_gradients), "gradient mode was"),
    "all rows": ("rows asked for", all_of_them, r"steps=\[3\].*1 rows.*4 rows"),
    "the first rows": ("rows asked for", from_the_first, r"row 3 .*for steps=\[3\]"),
    "batches": ("batch size", by_the_loop(in_batches), "with batch_size=1"),
    "noise": ("determinism", by_the_loop(with_noise), "when called again"),
    "a seed": ("random state", by_the_loop(seeded), "NumPy's random state"),
    "the mode": ("model unchanged", by_the_loop(in_training), "and is training"),
    "a hook": ("model unchanged", by_the_loop(hooked), "pre hooks of lm_head was 0"),
    "an attribute": (
        "objects unchanged",
        by_the_loop(remembered),
        "last of the Captum",
    ),
    "tokenised": ("ids never re-tokenised", by_the_loop(read_again), "' 7 p'"),
    "a question": (
        "refusal without a call",
        Engine(by_the_loop(lambda row, *_: row), unsuitable=asks),
        "1 forward passes",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_engine_is_told(name):
    """The law, what came, and where."""
    law, engine, pattern = BROKEN[name]
    with pytest.raises(LawsBroken, match=rf"(?s)1 law, it is broken.*{pattern}"):
        check_engine(engine, method=Mine, laws=[law], cases=ONE)


def test_every_law_has_an_engine_that_breaks_it():
    """So that none passes whatever comes."""
    assert {law for law, _, _ in BROKEN.values()} == set(ENGINE_LAWS)


def test_one_report_names_all_that_is_broken():
    """Broken laws stand in front, and the rest has its verdict."""
    with pytest.raises(LawsBroken) as caught:
        check_engine(by_the_loop(own_unit), method=Mine, cases=ONE)
    report = caught.value.report
    broken = {finding.law for finding in report.broken}
    assert {"causality", "equality to the loop"} <= broken
    assert {f.law for f in report.findings} == set(ENGINE_LAWS)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("check_engine: by_the_loop.<locals>.rows: 15 laws, ")
    assert lines[1].split()[-1] == "broken"


SMALL = {"repeats": 6, "cases": ONE}
CHEAP = ["equality to the loop", "model unchanged"]
DEAR = {"ShapleyValues", "LShap"}


@pytest.mark.parametrize(
    "method", [m for m in _engines if m is not OneShotReAGent], ids=lambda m: m.__name__
)
@pytest.mark.filterwarnings("ignore:LayerGradientShap")
def test_engines_of_the_package_keep_the_laws(method):
    """All laws; the main ones for those that ask the model often."""
    declared = capability_of(method)
    is_random = declared is not None and declared.random
    is_dear = is_random or method.__name__ in DEAR
    report = check_engine(method, laws=CHEAP if is_dear else None, **SMALL)
    assert {finding.verdict for finding in report.findings} == {"pass"}


def test_a_factory_gives_what_a_class_alone_cannot():
    """The masked model of ReAGent."""
    masked = tiny_tokenizer("wordpiece")
    masked.add_special_tokens({"mask_token": "[MASK]"})
    with torch.random.fork_rng():
        bert = BertForMaskedLM(
            BertConfig(
                vocab_size=len(masked),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=1,
            )
        ).eval()

    def factory(model, tokenizer):
        method = OneShotReAGent(
            model, tokenizer=tokenizer, masked_lm=bert, masked_tokenizer=masked
        )
        return LLMAttribution(method, tokenizer)

    engine = _engines[OneShotReAGent]
    laws = ["runs", "equality to the loop", "rows asked for", "model unchanged"]
    report = check_engine(engine, factory=factory, laws=laws, cases=ONE)
    assert {finding.verdict for finding in report.findings} == {"pass"}


def test_the_methods_of_an_engine_are_found():
    """Those that it is registered for, each a case of its own."""
    laws = ["shape", "refusal without a call"]
    assert check_engine(TOKENS, laws=laws).verdict("shape") == "pass"
    rows = TOKENS.rows
    assert str(check_engine(rows, laws=laws)).startswith(
        f"check_engine: {rows.__name__}"
    )


def test_cases_that_an_engine_refuses_are_left_out():
    """Before any row, or by the first; where none is left that is an error."""
    plain = by_the_loop(lambda row, *_: row)

    def only_gpt2(task):
        kind = task.llm_attr.model.config.model_type
        return None if kind == "gpt2" else f"{kind} is too new"

    def late(task, steps):
        if reason := only_gpt2(task):
            raise Unsuitable(reason)
        yield from plain(task, steps)

    for engine in (Engine(plain, unsuitable=only_gpt2), late):
        assert check_engine(engine, method=Mine, laws=["runs"]).broken == ()
        with pytest.raises(ValueError, match=r"cases: .* llama, bpe: llama is too new"):
            check_engine(engine, method=Mine, cases=ONE)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((3,), TypeError, "engine: must be an Engine, a function .* int 3 came"),
        ((fails,), ValueError, r"must be registered .* Register it, or pass method="),
        ((Mine,), ValueError, "Mine has no engine"),
        ((Mine, 3), TypeError, "where an input is given"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, match):
    """With what to pass."""
    with pytest.raises(error, match=match):
        check_engine(*arguments)


def test_one_run_is_no_mean():
    """Nor is none."""
    with pytest.raises(ValueError, match="repeats: must be 2 or more, but 1"):
        check_engine(FeatureAblation, repeats=1)


def test_a_captum_object_needs_an_input(model, tokenizer):
    """The second form is about a text."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    with pytest.raises(TypeError, match="inp: must be given with a Captum object"):
        check_engine(llm_attr)
    assert check_engine(llm_attr, TextTokenInput("Ana", tokenizer), " has").row == 0


def test_an_engine_may_be_exact_where_the_loop_samples():
    """The mean of the loop is what it must give; one that is off is told."""
    kept = {}

    def exact(task, steps):
        # It gives the same each time, and takes long.
        if len(steps) not in kept:
            kept[len(steps)] = list(_engines[ShapleyValues].rows(task, steps))
        return kept[len(steps)]

    arguments = {"method": ShapleyValueSampling, "cases": ONE, "repeats": 8}
    arguments["laws"] = ["equality to the loop"]
    check_engine(exact, **arguments)

    def off(task, steps):
        for row in exact(task, steps):
            yield np.array(row) + 0.5 * (np.array(row) != 0)

    with pytest.raises(LawsBroken, match="standard errors over 8 runs"):
        check_engine(off, **arguments)


def test_rounding_is_no_difference_where_it_is_allowed():
    """The tolerance is that of the caller."""
    engine = by_the_loop(lambda row, *_: row * 1.001)
    arguments = {"method": LayerGradientXActivation, "cases": ONE}
    laws = ["equality to the loop"]
    check_engine(engine, laws=laws, tolerance=0.01, **arguments)
    with pytest.raises(LawsBroken, match=r"off by 0\.001 of the largest"):
        check_engine(engine, laws=laws, **arguments)
