"""What engines say of themselves, how large their passes are, and how they go on."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    LLMGradientAttribution,
    ShapleyValues,
    ShapleyValueSampling,
    TextTemplateInput,
)
from torch import nn

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage.causal import CausalModel
from captum_cage.engines import Engine, columns, refill, shapley, suppression, tokens
from captum_cage.engines import probing as probing_engine
from captum_cage.engines.engine import never
from captum_cage.engines.registry import _engines
from captum_cage.engines.sequences import SequenceScorer
from captum_cage.inputs import Prompt
from captum_cage.methods import AttentionRollout, AttentionSuppression
from captum_cage.methods.method import UnitMethod
from captum_cage.methods.probing import ContextLengthProbing, WeightedLogRatio
from captum_cage.methods.reagent import OneShotReAGent, Stretch
from captum_cage.methods.subsets import CLime, ContextCite, LShap
from captum_cage.task import RowTask, text_units
from captum_cage.testing import check_engine
from captum_cage.units import split_units
from tiny import image_input

SHORT = "Ana has 3 pens."
TARGET = " Mia has 7. So"
# Engines with batches of their own, and what makes them.
OWN_BATCHES = {
    ContextLengthProbing: probing_engine,
    WeightedLogRatio: probing_engine,
    AttentionSuppression: suppression,
    OneShotReAGent: refill,
}
by_unit = pytest.mark.parametrize("method", OWN_BATCHES)
by_memory = pytest.mark.parametrize(
    "method", [one for one in OWN_BATCHES if one is not AttentionSuppression]
)


def made(method, model):
    """A method in Captum's wrapper; a refill is what is put by its test."""
    if method is OneShotReAGent:
        one = object.__new__(method)
        UnitMethod.__init__(one, model)
        return one
    return method(model)


@pytest.fixture(autouse=True)
def refills(monkeypatch):
    """What is written for a unit, by the position of its first token: another id."""
    written = {}

    def refill_of(_, ids, places, __):
        return [
            Stretch(
                int(place),
                int(place) + 1,
                written.get(int(place), (int(ids[place]) + 1,)),
            )
            for place in places
        ]

    monkeypatch.setattr(OneShotReAGent, "refill", refill_of)
    return written


def task_of(llm_attr, inp, target=TARGET, units="token", **options):
    """What an engine is given, outside of any call."""
    tokenizer = llm_attr.tokenizer
    kwargs = options.pop("kwargs", {})
    prompt = Prompt.read(inp, tokenizer)
    ids = tuple(tokenizer.encode(target))
    source, generated = (units, units) if isinstance(units, str) else units
    sides = split_units({"source": source, "generated": generated})
    text, sources, steps, _ = text_units(prompt, list(ids), sides, tokenizer)
    return RowTask(llm_attr, prompt, ids, text, sources, steps, 0, kwargs, **options)


def rows_of(method, task, steps=None):
    """All rows of a task by the engine of a method, or some of them."""
    steps = range(len(task.steps)) if steps is None else steps
    return np.stack(list(_engines[method].rows(task, list(steps))))


class Passes:
    """Every forward pass of a class of models, and what goes wrong in it."""

    def __init__(self, monkeypatch, kind):
        self.shapes = []
        self.failure = lambda *_: None
        forward = kind.forward

        @functools.wraps(forward)
        def recorded(model, *args, **kwargs):
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.shapes.append(tuple(ids.shape))
            error = self.failure(len(self.shapes), ids)
            if error is not None:
                raise error
            return forward(model, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", recorded)

    @property
    def widest(self):
        """Most sequences in one pass."""
        return max(count for count, _ in self.shapes)


@pytest.fixture
def passes(model, monkeypatch):
    """The passes of the small Llama."""
    return Passes(monkeypatch, type(model))


class LogitsAlone(nn.Module):
    """A model that gives logits and has no layer of its own that makes them."""

    device = torch.device("cpu")

    def __init__(self, inner):
        super().__init__()
        self.inner = [inner]

    def forward(self, input_ids, attention_mask=None):
        """The inner model's logits, of whole texts alone."""
        return self.inner[0](input_ids=input_ids, attention_mask=attention_mask)


class TestWhatEnginesSay:
    """Of themselves, to those who plan a call."""

    def test_a_function_alone_suits_every_task_and_costs_by_row(self):
        """And its passes are not counted before they are made."""
        engine = Engine(print)
        assert engine == Engine(print, never, by_row=True, rehearsed=False)
        assert engine.unsuitable(None) is None

    @pytest.mark.parametrize("method", list(_engines))
    def test_which_rows_cost_less_and_which_passes_are_rehearsed(self, method):
        """Gradients are taken row by row; attention is read outside of any reader."""
        engine = _engines[method]
        assert engine.by_row == (engine is _engines[next(iter(GRADIENTS))])
        assert engine.rehearsed == (engine is not tokens.TOKENS)

    @pytest.mark.parametrize("kind", [Engine, probing_engine._Text, refill._Text])
    def test_engines_and_texts_of_a_batch_cannot_be_changed(self, kind):
        """A field is not set."""
        one = object.__new__(kind)
        for field in dataclasses.fields(kind):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(one, field.name, None)

    @pytest.mark.parametrize(
        "method", [FeatureAblation, WeightedLogRatio, CLime, LShap, ContextCite]
    )
    def test_baselines_that_are_drawn_serve_one_trial(self, model, tokenizer, method):
        """Each trial draws them anew; those that are given serve any number."""
        llm_attr = LLMAttribution(
            method(model, tokenizer) if method is WeightedLogRatio else method(model),
            tokenizer,
        )
        engine, values = _engines[method], ["Ana", "pens"]
        for baselines in (lambda: ("Mia", "hats"), ["Mia", "hats"]):
            inp = TextTemplateInput("{} has {}.", values, baselines=baselines)
            for trials in (None, 1, 2):
                kwargs = {} if trials is None else {"num_trials": trials}
                task = task_of(llm_attr, inp, kwargs=kwargs)
                refused = engine.unsuitable(task)
                assert (refused is not None) == (callable(baselines) and trials == 2)
                assert not refused or "drawn anew in each trial" in refused

    @pytest.mark.parametrize("method", [CLime, ContextCite])
    @pytest.mark.parametrize("by_token", [False, True])
    @pytest.mark.parametrize("units", ["token", "sentence"])
    def test_fits_to_tokens_that_do_not_add_up_are_left_to_the_loop(
        self, vision_model, tokenizer, method, by_token, units
    ):
        """Where units have several and the input is scored token by token."""
        llm_attr = LLMAttribution(method(vision_model), tokenizer)
        inp = TokenIdsInput(tokenizer.encode(SHORT), tokenizer)
        if by_token:
            inp = image_input(tokenizer)
        task = task_of(llm_attr, inp, units=("token", units))
        assert task.by_token == by_token
        refused = _engines[method].unsuitable(task)
        left = method is ContextCite and by_token and units == "sentence"
        assert (refused is not None) == left
        assert not left or "does not add up" in refused

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            (CLime, {"oversampling": 2, "scalarizer": "sum", "never_perturb": [0]}),
            (LShap, {"neighbors": 1, "max_units_replaced": 1}),
            (ContextCite, {"n_samples": 4, "alpha": 0.1}),
            (ShapleyValueSampling, {"n_samples": 3}),
            *((method, {}) for method in (FeatureAblation, ShapleyValues)),
            *((method, {"num_trials": 2}) for method in OWN_BATCHES),
        ],
    )
    def test_arguments_of_the_method_are_the_engine_s_too(
        self, model, tokenizer, method, options
    ):
        """One that it does not know is left to the loop."""
        inp = TokenIdsInput(tokenizer.encode(SHORT), tokenizer)
        llm_attr = LLMAttribution(made(method, model), tokenizer)
        suits = _engines[method].unsuitable
        assert suits(task_of(llm_attr, inp, kwargs=options)) is None
        other = suits(task_of(llm_attr, inp, kwargs={**options, "other": 1}))
        assert other == "the argument 'other' is Captum's own matter"

    def test_exact_values_are_those_of_at_most_fourteen_units(self, model, tokenizer):
        """Before the last row."""
        llm_attr = LLMAttribution(ShapleyValues(model), tokenizer)
        (one,) = tokenizer.encode(" Mia")
        for count in (13, 14):
            inp = TokenIdsInput([one] * count, tokenizer)
            task = task_of(llm_attr, inp, " Mia Mia")
            refused = shapley.EXACT_SHAPLEY.unsuitable(task)
            assert (refused is None) == (count == 13)


GRADIENTS = [method for method, engine in _engines.items() if engine.by_row]


class TestSizesOfPasses:
    """How many texts a model reads at once."""

    @by_unit
    def test_a_number_that_is_given_is_that_of_every_pass(
        self, model, tokenizer, passes, method
    ):
        """But for the last ones; it holds whatever memory there is."""
        llm_attr = LLMAttribution(made(method, model), tokenizer)
        inp = TokenIdsInput([*tokenizer.encode(SHORT)] * 2, tokenizer)
        for size in (2, 5):
            passes.shapes.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(OWN_BATCHES[method], "_ENOUGH_TOKENS", {"cuda": 1})
                rows_of(method, task_of(llm_attr, inp, batch_size=size))
            counts = [count for count, _ in passes.shapes if count > 1]
            assert set(counts[:2]) == {size}

    @by_unit
    def test_no_more_go_at_once_than_are_fast(
        self, model, tokenizer, passes, method, monkeypatch, refills
    ):
        """By the tokens that a pass pushes; one text goes in any case."""
        llm_attr = LLMAttribution(made(method, model), tokenizer)
        inp = TokenIdsInput([*tokenizer.encode(SHORT)] * 3, tokenizer)
        refills |= dict.fromkeys(range(1, 30, 3), (5, 6, 7, 8, 9))
        for most in (1, 40, 100):
            enough = {"cpu": most, "cuda": 10**9}
            monkeypatch.setattr(OWN_BATCHES[method], "_ENOUGH_TOKENS", enough)
            passes.shapes.clear()
            rows_of(method, task_of(llm_attr, inp))
            several = [count * length for count, length in passes.shapes if count > 1]
            assert all(pushed <= most for pushed in several)
            assert bool(several) == (most > 1)
            assert not several or max(several) > most // 2

    @by_memory
    @pytest.mark.parametrize("alone", [False, True])
    def test_half_of_the_free_memory_is_taken(
        self, model, tokenizer, passes, method, monkeypatch, alone
    ):
        """And room is left for three copies of the logits where they come whole."""
        monkeypatch.setattr(CausalModel, "vocabulary_bytes", lambda _: 1000)
        monkeypatch.setattr(OWN_BATCHES[method], "bytes_per_token", lambda _: 100)
        asked = LogitsAlone(model).eval() if alone else model
        llm_attr = LLMAttribution(made(method, asked), tokenizer)
        ids = tokenizer.encode(SHORT)
        # All texts are as long as the plain one where a prefix cannot be reused.
        inp = TokenIdsInput([*ids] * 2, tokenizer)
        task = task_of(llm_attr, inp)
        length, stop = 2 * len(ids) + len(task.generated) - 1, len(task.generated)
        if method is OneShotReAGent and not alone:
            return
        each = 100 * length + 3 * stop * 1000 * alone
        for free, widest in ((0, 1), (6 * each, 3), (8 * each - 2, 3), (8 * each, 4)):
            monkeypatch.setattr(OWN_BATCHES[method], "free_bytes", lambda _, n=free: n)
            passes.shapes.clear()
            rows_of(method, task_of(llm_attr, inp))
            if method is ContextLengthProbing:
                # Its texts are cut: more of them go at once than of whole ones.
                for count, size in passes.shapes:
                    taken = count * (100 * size + 3 * stop * 1000 * alone)
                    assert count == 1 or taken <= free / 2
                assert (passes.widest > 1) == (widest > 1)
            else:
                counts = [count for count, size in passes.shapes if size == length]
                assert max(counts) == widest

    @by_memory
    def test_no_more_than_a_fixed_amount_is_taken_on_the_host(
        self, model, tokenizer, passes, method, monkeypatch
    ):
        """However much is free."""
        module = OWN_BATCHES[method]
        monkeypatch.setattr(module, "free_bytes", lambda _: 10**12)
        llm_attr = LLMAttribution(made(method, model), tokenizer)
        inp = TokenIdsInput(tokenizer.encode(SHORT), tokenizer)
        rows_of(method, task_of(llm_attr, inp))
        assert passes.widest > 2
        passes.shapes.clear()
        monkeypatch.setattr(module, "bytes_per_token", lambda _: 2**29)
        rows_of(method, task_of(llm_attr, inp))
        assert passes.widest == 1

    def test_weights_of_attention_take_memory_where_they_are_made(
        self, model, tokenizer, passes, monkeypatch
    ):
        """Three copies of them, of all heads, in float32."""
        monkeypatch.setattr(probing_engine, "bytes_per_token", lambda _: 100)
        llm_attr = LLMAttribution(WeightedLogRatio(model), tokenizer)
        inp = TokenIdsInput(tokenizer.encode(SHORT) * 2, tokenizer)
        task = task_of(llm_attr, inp)
        length = len(task.prompt.ids) + len(task.generated) - 1
        heads = model.config.num_attention_heads
        each = 100 * length + 3 * heads * length**2 * 4
        for kind, widest in (("eager", 3), ("sdpa", None)):
            monkeypatch.setattr(model.config, "_attn_implementation", kind)
            monkeypatch.setattr(probing_engine, "free_bytes", lambda _: 6 * each)
            passes.shapes.clear()
            rows_of(WeightedLogRatio, task_of(llm_attr, inp))
            assert passes.widest == widest if widest else passes.widest > 3
            if kind == "eager":
                monkeypatch.setattr(
                    probing_engine, "free_bytes", lambda _: 8 * each - 2
                )
                passes.shapes.clear()
                rows_of(WeightedLogRatio, task_of(llm_attr, inp))
                assert passes.widest == 3

    def test_masks_take_their_share(self, model, tokenizer, passes, monkeypatch):
        """Of what is pushed, times the whole text."""
        llm_attr = LLMAttribution(AttentionSuppression(model), tokenizer)
        inp = TokenIdsInput(tokenizer.encode(SHORT), tokenizer)
        whole = task_of(llm_attr, inp)
        length = len(whole.prompt.ids) + len(whole.generated) - 1
        for most in (1, 4 * length * length, 10**9):
            monkeypatch.setattr(suppression, "_MOST_MASK_BYTES", most)
            passes.shapes.clear()
            rows_of(AttentionSuppression, task_of(llm_attr, inp))
            several = [count * size for count, size in passes.shapes if count > 1]
            assert all(pushed * length <= most for pushed in several)
            assert bool(several) == (most > 1)

    @by_unit
    def test_a_batch_that_did_not_fit_is_halved_for_good(
        self, model, tokenizer, passes, method
    ):
        """It is not tried again in its size, whoever gave it; nothing is lost."""
        llm_attr = LLMAttribution(made(method, model), tokenizer)
        inp = TokenIdsInput(tokenizer.encode(SHORT) * 2, tokenizer)
        expected = rows_of(method, task_of(llm_attr, inp))
        for given in (None, 8):
            refused = []

            def fails(_, ids, refused=refused):
                if len(ids) > 2:
                    refused.append(len(ids))
                    return RuntimeError("CUDA out of memory.")
                return None

            passes.failure = fails
            found = rows_of(method, task_of(llm_attr, inp, batch_size=given))
            passes.failure = lambda *_: None
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert len(refused) == len(set(refused)) >= 1
            assert sorted(refused, reverse=True) == refused
            assert given is None or refused == [8, 4]

    @by_unit
    def test_other_errors_are_passed_on(self, model, tokenizer, passes, method):
        """As they are, once whole texts are read."""
        llm_attr = LLMAttribution(made(method, LogitsAlone(model).eval()), tokenizer)
        if method is AttentionSuppression:
            llm_attr = LLMAttribution(made(method, model), tokenizer)
        inp = TokenIdsInput(tokenizer.encode(SHORT), tokenizer)
        task = task_of(llm_attr, inp)
        passes.failure = lambda _, ids: ValueError("mine") if len(ids) > 1 else None
        with pytest.raises(ValueError, match=r"^mine$"):
            rows_of(method, task)

    @pytest.mark.parametrize("method", [ContextLengthProbing, WeightedLogRatio])
    def test_texts_and_rows_may_come_a_few_at_a_time(
        self, model, tokenizer, method, monkeypatch
    ):
        """The rows are the same."""
        llm_attr = LLMAttribution(made(method, model), tokenizer)
        inp = TokenIdsInput(tokenizer.encode(SHORT), tokenizer)
        expected = rows_of(method, task_of(llm_attr, inp))
        monkeypatch.setattr(probing_engine, "_LAID_OUT", 3)
        monkeypatch.setattr(probing_engine, "_TOGETHER", 2)
        found = rows_of(method, task_of(llm_attr, inp))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_refills_may_be_laid_out_a_few_at_a_time(
        self, model, tokenizer, refills, monkeypatch
    ):
        """Longer and shorter ones, at the beginning and at the end of the text."""
        llm_attr = LLMAttribution(made(OneShotReAGent, model), tokenizer)
        ids = tokenizer.encode(SHORT)
        inp = TokenIdsInput(ids, tokenizer)
        last = len(ids) + len(tokenizer.encode(TARGET)) - 2
        refills |= {0: (5, 6, 7), 2: (), 3: (ids[3],), last: (ids[0], 9), last - 1: ()}
        expected = rows_of(OneShotReAGent, task_of(llm_attr, inp))
        assert not expected[:, 3].any()
        assert expected[:, 0].all()
        monkeypatch.setattr(refill, "_LAID_OUT", 2)
        found = rows_of(OneShotReAGent, task_of(llm_attr, inp))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        whole = LLMAttribution(
            made(OneShotReAGent, LogitsAlone(model).eval()), tokenizer
        )
        found = rows_of(OneShotReAGent, task_of(whole, inp))
        np.testing.assert_allclose(found, expected, atol=1e-5)

    @pytest.mark.parametrize("reused", [True, False])
    def test_refills_may_begin_like_what_they_stand_for(
        self, model, tokenizer, refills, reused
    ):
        """Or like what follows: the first token after them is scored anew."""
        asked = model if reused else LogitsAlone(model).eval()
        llm_attr = LLMAttribution(made(OneShotReAGent, asked), tokenizer)
        ids = tokenizer.encode(SHORT)
        text = [*ids, *tokenizer.encode(TARGET)]
        inp = TokenIdsInput(ids, tokenizer)
        end = len(text) - 2
        for written in (
            {end: (), end - 1: (), end - 2: ()},
            {place: (text[place], text[place + 1]) for place in range(3, end)},
            {place: (text[place], 9) for place in range(3, end)},
            {0: (), len(ids) - 1: ()},
        ):
            refills.clear()
            refills |= written
            check_engine(llm_attr, inp, TARGET, batch_size=1, tolerance=1e-5)

    @pytest.mark.parametrize("method", [AttentionSuppression, OneShotReAGent])
    def test_passes_go_on_from_what_the_plain_text_left(
        self, model, tokenizer, method, monkeypatch
    ):
        """To the end: no pass from a prefix fails."""
        given_up = []
        give_up = SequenceScorer.give_up_prefix

        def recorded(self):
            given_up.append(self)
            give_up(self)

        monkeypatch.setattr(SequenceScorer, "give_up_prefix", recorded)
        llm_attr = LLMAttribution(made(method, model), tokenizer)
        inp = TokenIdsInput(tokenizer.encode(SHORT), tokenizer)
        for size in (None, 1):
            rows_of(method, task_of(llm_attr, inp, batch_size=size))
            assert not given_up

    @pytest.mark.parametrize("size", [None, 1])
    @pytest.mark.parametrize(
        "method", [*OWN_BATCHES, FeatureAblation, AttentionRollout]
    )
    def test_units_need_not_be_numbered_in_the_order_of_the_text(
        self, model, tokenizer, method, size
    ):
        """Nor stand in one piece."""
        wrapper = LLMAttribution
        if method is AttentionRollout:
            wrapper = LLMGradientAttribution
        llm_attr = wrapper(made(method, model), tokenizer)
        ids = tokenizer.encode(SHORT)
        for groups in ([2, 1, 1, 0, 2], [1, 0, -1, 1, 0]):
            inp = TokenIdsInput(ids, tokenizer, groups)
            units = {
                "source": "token",
                "generated": [(0, 4), (4, 8), (8, 11), (11, 14)],
            }
            check_engine(llm_attr, inp, TARGET, batch_size=size, units=units)

    @by_memory
    def test_the_model_s_forward_is_called_as_captum_calls_it(
        self, model, tokenizer, method
    ):
        """Without the hooks of the model itself."""
        called = []
        hook = model.register_forward_pre_hook(lambda *_: called.append(1))
        try:
            llm_attr = LLMAttribution(made(method, model), tokenizer)
            inp = TokenIdsInput(tokenizer.encode(SHORT), tokenizer)
            rows_of(method, task_of(llm_attr, inp))
        finally:
            hook.remove()
        assert not called


EVERY = [
    *OWN_BATCHES,
    *(FeatureAblation, ShapleyValues, ShapleyValueSampling, CLime, LShap),
    *(ContextCite, AttentionRollout),
]


def some_task(method, model, tokenizer, **options):
    """A task of few units."""
    if method is AttentionRollout:
        llm_attr = LLMGradientAttribution(method(model), tokenizer)
    else:
        llm_attr = LLMAttribution(made(method, model), tokenizer)
    short = method in (ShapleyValues, CLime, ContextCite)
    kwargs = {"n_samples": 12} if method is ContextCite else {}
    if method is ShapleyValueSampling:
        kwargs = {"n_samples": 6}
    text = "Ana has 3" if short else SHORT
    inp = TokenIdsInput(tokenizer.encode(text), tokenizer)
    target = " 7. So" if short else TARGET
    return task_of(llm_attr, inp, target, kwargs=kwargs, **options)


class TestGoingOn:
    """Work that was finished, in the same task."""

    @pytest.mark.parametrize("method", EVERY[:-1])
    def test_scores_of_the_whole_text_are_kept(self, model, tokenizer, method):
        """Where all rows are asked for."""
        task = some_task(method, model, tokenizer)
        rows_of(method, task, [0])
        assert "scores" not in task.kept
        rows_of(method, task)
        ids = torch.tensor([[*task.prompt.ids, *task.generated]])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(dim=-1)
        first = len(task.prompt.ids)
        expected = [float(logs[i - 1, ids[0, i]]) for i in range(first, ids.shape[1])]
        np.testing.assert_allclose(task.kept["scores"], expected, atol=1e-5)

    @pytest.mark.parametrize("method", EVERY)
    def test_rows_are_there_whatever_was_asked_before(self, model, tokenizer, method):
        """Fewer rows or more; a row has nothing from its own unit on."""
        task = some_task(method, model, tokenizer)
        count, sources = len(task.steps), len(task.sources)
        for steps in ([0, 1], range(count), [1], [count - 1], range(count)):
            torch.manual_seed(0)
            found = rows_of(method, task, steps)
            fresh = some_task(method, model, tokenizer)
            torch.manual_seed(0)
            expected = rows_of(method, fresh, steps)
            assert found.shape == expected.shape
            for step, row, other in zip(steps, found, expected, strict=True):
                assert not row[sources + step :].any()
                assert row[: sources + step].any()
                if method in (ShapleyValueSampling, CLime, ContextCite):
                    continue
                np.testing.assert_allclose(row, other, atol=2e-5)

    @pytest.mark.parametrize(
        ("method", "name"),
        [
            (ShapleyValueSampling, "permutations"),
            (ShapleyValues, "subsets"),
            (FeatureAblation, "perturbations"),
            (CLime, "perturbations"),
            (LShap, "perturbations"),
            (ContextCite, "perturbations"),
            *((method, "perturbations") for method in OWN_BATCHES),
        ],
    )
    def test_a_bar_counts_what_was_done_before(
        self, model, tokenizer, passes, method, name, capsys, monkeypatch
    ):
        """It ends full after an interrupt, and for one who wants it alone."""
        monkeypatch.setattr(shapley, "_TOGETHER", 1)
        task = some_task(method, model, tokenizer, batch_size=1)
        torch.manual_seed(0)
        rows_of(method, task)
        assert not capsys.readouterr().err
        task = some_task(method, model, tokenizer, batch_size=1, show_progress=True)
        whole, passes.shapes = len(passes.shapes), []
        passes.failure = lambda n, _: KeyboardInterrupt() if n == whole // 2 else None
        torch.manual_seed(0)
        with pytest.raises(KeyboardInterrupt):
            rows_of(method, task)
        cut = capsys.readouterr().err
        assert name in cut
        assert "100%" not in cut
        passes.failure = lambda *_: None
        passes.shapes.clear()
        rows_of(method, task)
        assert len(passes.shapes) < 0.9 * whole
        *_, last = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")
        assert f"{name}: 100%" in last
        done, total = last.split("|")[2].split("[")[0].split("/")
        assert int(done) == int(total) > 3

    def test_permutations_that_were_summed_are_not_drawn_again(
        self, model, tokenizer, passes, monkeypatch
    ):
        """After an interrupt; for other rows all are drawn."""
        monkeypatch.setattr(shapley, "_TOGETHER", 1)
        drawn = []
        permuted = torch.randperm

        def recorded(count):
            drawn.append(count)
            return permuted(count)

        monkeypatch.setattr(torch, "randperm", recorded)
        task = some_task(ShapleyValueSampling, model, tokenizer)
        stop = len(task.steps)
        passes.failure = lambda *_: KeyboardInterrupt() if len(drawn) == 4 else None
        with pytest.raises(KeyboardInterrupt):
            rows_of(ShapleyValueSampling, task)
        passes.failure = lambda *_: None
        rows_of(ShapleyValueSampling, task)
        # The fourth was cut off.
        assert drawn == [len(task.sources) + stop - 1] * 7
        rows_of(ShapleyValueSampling, task, [0, 1])
        assert drawn[7:] == [len(task.sources) + 1] * 6

    def test_attention_of_the_same_rows_is_read_once(
        self, model, tokenizer, monkeypatch
    ):
        """Other rows of the same task are read anew."""
        asked, lengths = [], []
        rows = AttentionRollout.rows

        def recorded(self, ids, targets):
            assert not torch.is_grad_enabled()
            asked.append((len(ids), len(targets)))
            return rows(self, ids, targets)

        monkeypatch.setattr(AttentionRollout, "rows", recorded)
        monkeypatch.setattr(
            tokens, "check_length_dependence", lambda _, n: lengths.append(n)
        )
        task = some_task(AttentionRollout, model, tokenizer)
        prompt, count = len(task.prompt.ids), len(task.steps)
        for steps in (range(count), range(count), [1, 2], [2], [2]):
            rows_of(AttentionRollout, task, steps)
        assert asked == [(prompt + count - 1, count), (prompt + 2, 2), (prompt + 2, 1)]
        # The loop reads the last target, too.
        assert lengths[0] == prompt + count

    def test_attention_that_does_not_fit_into_memory_is_told(
        self, model, tokenizer, monkeypatch
    ):
        """It cannot be read in smaller passes."""

        def fails(*_):
            raise RuntimeError("CUDA out of memory.")

        monkeypatch.setattr(AttentionRollout, "rows", fails)
        task = some_task(AttentionRollout, model, tokenizer)
        with pytest.raises(RuntimeError, match="one sequence must fit into memory"):
            rows_of(AttentionRollout, task)


class TestSetsOfAbsentUnits:
    """What rows that share sets of absent units are asked."""

    @pytest.mark.parametrize("method", [CLime, LShap, ContextCite])
    def test_each_is_scored_once_where_units_are_tokens(
        self, model, tokenizer, method, monkeypatch
    ):
        """A row's own token may be absent: nothing follows it that is scored."""
        asked = []
        scores = SequenceScorer.scores

        def recorded(self, perturbations):
            some = list(perturbations)
            asked.extend(some)
            return scores(self, some)

        monkeypatch.setattr(SequenceScorer, "scores", recorded)
        sets = []
        plan = method.plan

        def spied(self, options):
            made = plan(self, options)
            absent = type(made).absent_sets

            def remembered(of, units):
                found = absent(of, units)
                sets.extend(found[0])
                return found

            monkeypatch.setattr(type(made), "absent_sets", remembered)
            monkeypatch.setattr(method, "plan", plan)
            return made

        monkeypatch.setattr(method, "plan", spied)
        task = some_task(method, model, tokenizer)
        rows_of(method, task)
        assert len(asked) == len(set(sets)) > 3
        rows_of(method, task)
        assert len(asked) == len(set(sets))

    @pytest.mark.parametrize("method", [CLime, LShap, ContextCite])
    def test_a_set_without_which_the_text_cannot_be_is_named(
        self, model, tokenizer, method
    ):
        """By the units that are absent."""

        class Never(LogitsAlone):
            def forward(self, input_ids, attention_mask=None):
                found = super().forward(input_ids, attention_mask)
                banned = (input_ids == 0).any(dim=1)
                found.logits[banned, :, 1:] = -torch.inf
                return found

        task = some_task(method, Never(model).eval(), tokenizer)
        with pytest.raises(ValueError, match=r"came for generated unit .* without un"):
            rows_of(method, task)

    @pytest.mark.parametrize("method", [CLime, LShap, ContextCite])
    def test_nothing_is_attributed_to_units_that_are_never_absent(
        self, model, tokenizer, method
    ):
        """Rows with no other units are zero."""
        task = some_task(method, model, tokenizer)
        task = dataclasses.replace(
            task, kwargs={**task.kwargs, "never_perturb": range(len(task.sources))}
        )
        found = rows_of(method, task)
        assert not found[0].any()
        assert not found[:, : len(task.sources)].any()
        assert np.isfinite(found).all()
        assert found[-1].any()


class TestEffectsOfUnits:
    """What columns are filled with."""

    def test_names_of_columns_do_not_meet(self, model, tokenizer, monkeypatch):
        """Several engines may keep their work in one task."""
        names = {}
        of = columns.Columns.of.__func__

        def recorded(cls, task, key, units, rows):
            names[method] = key
            return of(cls, task, key, units, rows)

        monkeypatch.setattr(columns.Columns, "of", classmethod(recorded))
        for method in (FeatureAblation, *OWN_BATCHES):
            rows_of(method, some_task(method, model, tokenizer))
        assert len(set(names.values())) == len(names) == 5


def test_a_call_s_engine_is_the_one_that_is_listed(model, tokenizer):
    """Rows of a task are those of a call."""
    task = some_task(AttentionSuppression, model, tokenizer)
    cage = GraphContextAttribution(task.llm_attr)
    result = cage.attribute(task.prompt.inp, TARGET, strategy="fused")
    found = rows_of(AttentionSuppression, task)
    np.testing.assert_allclose(result.graph.rows, found, atol=1e-6)
