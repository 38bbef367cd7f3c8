"""What is told before the work is what it then takes, and nothing is changed."""

from __future__ import annotations

import json
import random
from inspect import signature
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    RemoteLLMAttribution,
    TextTokenInput,
)

from captum_cage import ChatTraceInput, GraphContextAttribution, register_engine
from captum_cage.cost import count_sequences
from captum_cage.engines.engine import Engine
from captum_cage.estimate import Estimate, Estimator
from captum_cage.methods.catalogue import capabilities, llm_attribution
from captum_cage.rehearsal import Pass
from test_methods_reagent import masked
from tiny import LocalProvider, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer("bpe")
PROMPT = "Ana has 3. Mia has 4. So it is 7."
TARGET = " So 7. It is 18. Write it. So she has 7."
NAMES = [declared.name for _, declared in capabilities()]
FEW = {"n_samples": 4, "n_steps": 3, "max_steps": 2}
WITHIN = 1.5


@pytest.fixture(scope="module")
def model():
    """A small model of this file's own, since what is found out of it is kept."""
    return tiny_model("llama", vocab_size=len(TOKENIZER))


def wrapped(name: str, model: Any) -> Any:
    """A base method by its name."""
    options = {}
    if name in ("reagent", "one-shot-reagent"):
        names = ("masked_lm", "masked_tokenizer")
        options = dict(zip(names, masked("bert"), strict=True))
    return llm_attribution(name, model, TOKENIZER, **options)


def few(name: str) -> dict[str, Any]:
    """Arguments that make a base method fast."""
    (declared,) = (one for _, one in capabilities() if one.name == name)
    return {} if declared.counted is None else {declared.counted: FEW[declared.counted]}


def both(
    llm_attr: Any, target: str | None = TARGET, inp: Any = None, **options: Any
) -> tuple[Estimate, int, int]:
    """The estimate, and the sequences and tokens that the model is then given."""
    inp = TextTokenInput(PROMPT, TOKENIZER) if inp is None else inp
    cage = GraphContextAttribution(llm_attr)
    torch.manual_seed(0)
    estimate = cage.estimate(inp, target, **options)
    torch.manual_seed(0)
    with count_sequences(cage.llm_attr) as counted:
        cage.attribute(inp, target, **options)
    return estimate, counted.sequences or 0, counted.tokens or 0


def within(told: float, happened: float) -> bool:
    """Whether a number is what it was told to be, by a factor of 1.5."""
    return happened / WITHIN <= told <= happened * WITHIN


class TestCounts:
    """Passes and tokens, of every base method."""

    @pytest.mark.parametrize("name", [name for name in NAMES if name != "reagent"])
    @pytest.mark.parametrize("units", ["sentence", "token"])
    def test_engines_are_rehearsed(self, name, units, model):
        """What they have the model read is what they then have it read."""
        if name in ("lime", "kernel-shap", "context-cite"):
            pytest.importorskip("sklearn")
        if (name, units) == ("shapley", "token"):
            pytest.skip("2 to the power of 36 subsets")
        estimate, sequences, tokens = both(
            wrapped(name, model), units=units, **few(name)
        )
        assert estimate.strategy == "fused"
        assert within(estimate.sequences, sequences)
        assert within(estimate.tokens, tokens)
        assert estimate.seconds > 0

    @pytest.mark.parametrize("name", NAMES)
    def test_the_loop_is_begun(self, name, model):
        """The other rows follow from a few."""
        if name in ("lime", "kernel-shap", "context-cite"):
            pytest.importorskip("sklearn")
        if name == "shapley":
            pytest.skip("all orders of the units of a row")
        estimate, sequences, tokens = both(
            wrapped(name, model), units="sentence", strategy="loop", **few(name)
        )
        assert estimate.strategy == "loop"
        assert within(estimate.sequences, sequences)
        assert within(estimate.tokens, tokens)

    @pytest.mark.parametrize(
        ("name", "question"),
        [
            ("ablation", {"foil": {"18": "9"}}),
            ("integrated-gradients", {"foil": {"18": "9"}}),
            ("shapley-sampling", {"draws": 3}),
            ("c-lime", {"num_trials": 2}),
            ("ablation", {"sparsify": 0.9, "hops": 1}),
        ],
    )
    def test_every_question(self, name, question, model):
        """Foils, draws, trials and approximations."""
        estimate, sequences, tokens = both(
            wrapped(name, model), units="word", **question, **few(name)
        )
        assert within(estimate.sequences, sequences)
        assert within(estimate.tokens, tokens)

    @pytest.mark.parametrize("name", ["ablation", "integrated-gradients"])
    def test_a_tolerance_gives_bounds(self, name, model):
        """Which rows matter is found out on the way."""
        strategy = "loop" if name == "ablation" else "fused"
        question = {"tolerance": 0.3, "explain": -1, "strategy": strategy}
        told, sequences, _ = both(
            wrapped(name, model), units="word", **question, **few(name)
        )
        assert told.fewest_rows == 1 < told.rows
        assert told.fewest_sequences / WITHIN <= sequences <= WITHIN * told.sequences
        assert " to " in str(told)

    def test_a_model_that_suits_no_engine(self):
        """It is found out, and the loop is counted."""
        model = tiny_model("llama", vocab_size=len(TOKENIZER))
        plain = model.forward

        def forward(input_ids: torch.Tensor, **more: Any) -> Any:
            found = plain(input_ids=input_ids, **more)
            found.logits = found.logits * (1 + 0.02 * input_ids.shape[1])
            return found

        model.forward = forward
        estimate, sequences, _ = both(wrapped("ablation", model), units="word")
        assert estimate.strategy == "loop"
        assert within(estimate.sequences, sequences)

    def test_a_method_of_your_own(self, model):
        """By the loop, or an engine of which nothing is known: begun, not finished."""

        class Mine(FeatureAblation):
            pass

        for by_row in (None, True, False):
            if by_row is not None:
                register_engine(
                    Mine,
                    Engine(lambda task, steps: _one_pass(task, steps), by_row=by_row),
                )
            llm_attr = LLMAttribution(Mine(model), TOKENIZER)
            estimate, sequences, _ = both(llm_attr, units="token")
            assert within(estimate.sequences, sequences)
            assert estimate.calibration_sequences < sequences

    def test_a_trace_is_given_already(self, model):
        """Nothing is generated."""
        messages = [
            {"role": "user", "content": "Ana has 3 pens."},
            {"role": "assistant", "content": "So she has 3. It is 3."},
        ]
        inp = ChatTraceInput(messages, TOKENIZER)
        told, sequences, _ = both(
            wrapped("ablation", model), None, inp, units="sentence"
        )
        assert told.generated_tokens == 0
        assert within(told.sequences, sequences)


def _one_pass(task: Any, steps: Any) -> Any:
    """Rows of nothing, at one pass each."""
    model = task.llm_attr.model
    for _ in steps:
        with torch.no_grad():
            model(torch.tensor([[*task.prompt.ids]]))
        yield np.zeros(task.width)


class TestGenerating:
    """A text that is not there yet."""

    def test_the_text_is_not_generated(self, model, monkeypatch):
        """A few tokens are, to see how long one takes."""
        asked = []
        plain = model.generate

        def generate(*args, **kwargs):
            asked.append(kwargs["max_new_tokens"])
            return plain(*args, **kwargs)

        monkeypatch.setattr(model, "generate", generate)
        cage = GraphContextAttribution(wrapped("ablation", model))
        inp = TextTokenInput(PROMPT, TOKENIZER)
        told = cage.estimate(inp, gen_args={"max_new_tokens": 30, "do_sample": False})
        assert max(asked) <= 5
        assert told.rows == told.generated_tokens == 30

    def test_it_is_counted(self, model):
        """As an upper bound, which holds where the model writes to the end."""
        gen_args = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        told, sequences, tokens = both(
            wrapped("ablation", model), None, gen_args=gen_args
        )
        assert within(told.sequences, sequences)
        assert within(told.tokens, tokens)

    def test_a_foil_needs_the_text(self, model):
        """Or the number of a unit."""
        cage = GraphContextAttribution(wrapped("ablation", model))
        inp = TextTokenInput(PROMPT, TOKENIZER)
        with pytest.raises(ValueError, match="foil: must name places by their numbers"):
            cage.estimate(inp, foil={"18": "9"})


class TestRemote:
    """Models that are asked over the network."""

    def test_few_requests_are_sent(self, model):
        """All are counted."""
        counts = []
        for _ in range(2):
            provider = LocalProvider(model, TOKENIZER)
            llm_attr = RemoteLLMAttribution(
                FeatureAblation(RemoteLLMAttribution.placeholder_model),
                TOKENIZER,
                provider,
            )
            counts.append((provider, GraphContextAttribution(llm_attr)))
        (asked, cage), (other, again) = counts
        inp = TextTokenInput(PROMPT, TOKENIZER)
        told = cage.estimate(inp, TARGET, units="sentence", calibration=3)
        again.attribute(inp, TARGET, units="sentence")
        assert len(asked.prompts) == told.calibration_sequences
        assert within(told.sequences, len(other.prompts))
        assert told.model_memory == 0
        assert "requests" in str(told)

    @pytest.mark.parametrize("share", [False, True])
    def test_requests_side_by_side_are_counted_as_they_will_be(self, model, share):
        """Each question once, and with ``share`` once for all rows."""
        counts = []
        for _ in range(2):
            provider: Any = LocalProvider(model, TOKENIZER)
            provider.concurrency, provider.share = 2, share
            llm_attr = RemoteLLMAttribution(
                FeatureAblation(RemoteLLMAttribution.placeholder_model),
                TOKENIZER,
                provider,
            )
            counts.append((provider, GraphContextAttribution(llm_attr)))
        (asked, cage), (other, again) = counts
        inp = TextTokenInput(PROMPT, TOKENIZER)
        told = cage.estimate(inp, TARGET, units="sentence", calibration=3)
        again.attribute(inp, TARGET, units="sentence")
        assert len(asked.prompts) == told.calibration_sequences
        assert told.sequences == len(other.prompts)


class TestNothingChanges:
    """An estimate leaves no trace."""

    def test_random_numbers_and_rows_are_as_before(self, model):
        """The same samples come afterwards, and nothing is kept."""
        cage = GraphContextAttribution(wrapped("shapley-sampling", model))
        inp = TextTokenInput(PROMPT, TOKENIZER)
        torch.manual_seed(1)
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        hooks = sum(len(one._forward_pre_hooks) for one in model.modules())
        kept = dict(vars(cage))
        model.train()
        cage.estimate(inp, TARGET, units="word", n_samples=2)
        assert model.training
        model.eval()
        assert torch.equal(states[0], torch.get_rng_state())
        assert all(map(np.array_equal, states[1], np.random.get_state()))  # noqa: NPY002
        assert states[2] == random.getstate()
        assert kept == vars(cage)
        assert hooks == sum(len(one._forward_pre_hooks) for one in model.modules())

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"calibration": 0}, ValueError, "calibration: "),
            ({"strategy": "quick"}, ValueError, "strategy: "),
            ({"n_sample": 3}, TypeError, "n_sample: "),
            ({"tolerance": 2}, ValueError, "tolerance: "),
            ({"explain": "nowhere"}, ValueError, "explain: "),
        ],
    )
    def test_what_attribute_refuses_is_refused(self, options, error, message, model):
        """In the same words."""
        cage = GraphContextAttribution(wrapped("ablation", model))
        with pytest.raises(error, match=message):
            cage.estimate(TextTokenInput(PROMPT, TOKENIZER), TARGET, **options)


class TestMemory:
    """Bytes by the formula, for what a process was seen to take."""

    def test_eager_attention_keeps_one_table_for_each_layer(self):
        """And two more while one is made: so many bytes for each pair of tokens."""
        model = tiny_model("llama", vocab_size=len(TOKENIZER))
        task = SimpleNamespace(llm_attr=wrapped("ablation", model))
        found = {}
        for implementation in ("eager", "sdpa"):
            model.config._attn_implementation = implementation
            for backward in (False, True):
                estimator = object.__new__(Estimator)
                estimator._task, estimator._largest = task, 0
                estimator._note([Pass(2, 10, before=5, backward=backward)], True)
                found[implementation, backward] = estimator._largest
        pairs = 2 * model.config.num_attention_heads * 10 * 15 * 4
        layers = model.config.num_hidden_layers
        assert found["eager", False] - found["sdpa", False] == 3 * pairs
        assert found["eager", True] - found["sdpa", True] == (2 + layers) * pairs


class TestEstimate:
    """What is told can be read."""

    def test_all_options_of_attribute_are_taken(self, model, tmp_path):
        """And a spool is not touched."""
        cage = GraphContextAttribution(wrapped("ablation", model))
        defaults = signature(cage.attribute).parameters.values()
        options = {
            one.name: one.default for one in defaults if one.kind is one.KEYWORD_ONLY
        }
        options |= {"spool": tmp_path / "rows", "show_progress": True, "batch_size": 2}
        inp = TextTokenInput(PROMPT, TOKENIZER)
        told = cage.estimate(inp, TARGET, **options)
        assert told.sequences == cage.estimate(inp, TARGET, batch_size=2).sequences
        assert not (tmp_path / "rows").exists()

    def test_as_a_table_and_as_numbers(self, model):
        """Bytes of the model are those of its parameters and buffers."""
        cage = GraphContextAttribution(wrapped("ablation", model))
        told = cage.estimate(TextTokenInput(PROMPT, TOKENIZER), TARGET)
        assert json.loads(json.dumps(told.to_dict()))["rows"] == told.rows
        lines = str(told).splitlines()
        assert lines[0].split() == ["method", "FeatureAblation,", "fused"]
        assert any(line.startswith("memory") for line in lines)
        weights = {id(one): one for one in (*model.parameters(), *model.buffers())}
        assert told.model_memory == sum(one.nbytes for one in weights.values())
        assert told.memory > told.model_memory
