"""What is counted is what the model was given, and never more than was estimated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerIntegratedGradients,
    Lime,
    LLMAttribution,
    LLMGradientAttribution,
    RemoteLLMAttribution,
    TextTemplateInput,
    TextTokenInput,
)
from torch import nn
from transformers import DynamicCache

from captum_cage import (
    ChatTraceInput,
    GraphAttributionResult,
    GraphContextAttribution,
    cost,
)
from captum_cage.cost import Counted, count_sequences, most_sequences
from captum_cage.engines.registry import engine_names
from captum_cage.methods.catalogue import capabilities, llm_attribution
from test_methods_reagent import masked
from tiny import ARCHITECTURES, LocalProvider, image_input, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer("bpe")
PROMPT = "Ana has 3. Mia has 4."
TARGET = " So 7. It is 18."
NAMES = [declared.name for _, declared in capabilities()]
WAYS = ("fused", "loop")
# Arguments that make a method fast.
FEW = {"n_samples": 3, "n_steps": 3, "max_steps": 3}
# Those whose engine makes one pass, or one for each unit.
EXACT = {"ablation", "attention-suppression", "clp-cage", "one-shot-reagent"} | {
    *("ifr", "attention-rollout", "mean-attention", "value-weighted-attention"),
}


def in_two(text: str) -> list[tuple[int, int]]:
    """The first visible character's word, and the rest of the text."""
    first = len(text) - len(text.lstrip())
    cut = text.find(" ", first) + 1
    return [(first, cut), (cut, len(text))] if cut and cut < len(text) else []


def wrapped(name: str, model: Any) -> Any:
    """A base method by its name."""
    options = {}
    if name in ("reagent", "one-shot-reagent"):
        options = dict(
            zip(("masked_lm", "masked_tokenizer"), masked("bert"), strict=True)
        )
    return llm_attribution(name, model, TOKENIZER, **options)


def arguments(name: str) -> dict[str, Any]:
    """Those of a base method that make it fast."""
    (declared,) = (d for _, d in capabilities() if d.name == name)
    counted = declared.counted
    return {} if counted is None else {counted: FEW[counted]}


def estimate(result: GraphAttributionResult) -> int | None:
    """What was estimated for a result, from what it knows of its question."""
    asked: Any = result._followup
    return most_sequences(
        asked.task,
        result.meta["strategy"],
        draws=asked.question.draws,
        contrasts=asked.question.contrasts,
        tolerance=asked.question.approximation.tolerance,
    )


def ask(
    llm_attr: Any, inp: Any = None, **question: Any
) -> tuple[int, int, GraphAttributionResult]:
    """What attribution costs the second time, the estimate, and the result."""
    if inp is None:
        inp = TextTokenInput(PROMPT, TOKENIZER)
    if not isinstance(inp, ChatTraceInput):
        question.setdefault("target", TARGET)
    question.setdefault("units", "sentence")
    cage = GraphContextAttribution(llm_attr, normalization="absolute")
    cage.attribute(inp, **question)
    with count_sequences(cage.llm_attr) as counted:
        result = cage.attribute(inp, **question)
    most = estimate(result)
    assert most is not None
    assert counted.sequences is not None
    return counted.sequences, most, result


class TestEstimates:
    """An upper bound by counting."""

    @pytest.mark.parametrize(
        ("name", "bounded", "strategy"),
        [
            *((name, False, strategy) for name in NAMES for strategy in WAYS),
            *((name, True, "fused") for name in NAMES if name != "reagent"),
            # The loop asks Captum, which knows nothing of a bound.
            ("ablation", True, "loop"),
            ("integrated-gradients", True, "loop"),
            ("reagent", True, "loop"),
        ],
    )
    def test_no_method_gives_the_model_more(self, name, bounded, strategy):
        """Asked again, and refined; models that bound their logits, too."""
        if name in ("lime", "kernel-shap", "context-cite"):
            pytest.importorskip("sklearn")
        if name == "reagent" and strategy == "fused":
            pytest.skip("it has no engine")
        model = tiny_model("llama", vocab_size=len(TOKENIZER))
        if bounded:
            model = tiny_model(
                "gemma3", vocab_size=len(TOKENIZER), final_logit_softcapping=3.0
            )
        torch.manual_seed(0)
        took, most, coarse = ask(
            wrapped(name, model), explain=-1, strategy=strategy, **arguments(name)
        )
        assert coarse.meta["strategy"] == strategy
        assert 0 < took <= most
        side = "source" if coarse.seq_attr.any() else "generated"
        finer = coarse.refine(1, in_two, side=side)
        told = finer.meta["refined"]
        assert len(finer.units) == len(coarse.units) + 1
        assert 0 < told["sequences"] <= told["estimated_sequences"]
        if name in EXACT and not bounded:
            assert told["estimated_sequences"] <= 3 * told["sequences"]

    @pytest.mark.parametrize("units", ["token", "word"])
    @pytest.mark.parametrize(
        "name",
        (
            "ablation lime kernel-shap shapley-sampling clp l-shap "
            "integrated-gradients attnlrp attention-x-ig gradient-shap"
        ).split(),
    )
    def test_small_units_cost_no_more_than_estimated(self, name, units):
        """Of one token each, and of several."""
        if name in ("lime", "kernel-shap"):
            pytest.importorskip("sklearn")
        model = tiny_model("llama", vocab_size=len(TOKENIZER))
        took, most, _ = ask(wrapped(name, model), units=units, **arguments(name))
        assert took <= most

    @pytest.mark.parametrize("architecture", list(ARCHITECTURES))
    def test_of_every_family_of_models(self, architecture):
        """Perturbed and differentiated."""
        for name in ("ablation", "attnlrp", "attention-suppression", "ifr"):
            model = tiny_model(architecture, vocab_size=len(TOKENIZER))
            took, most, _ = ask(wrapped(name, model))
            assert took <= most

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("count", [1, 4, 9])
    def test_many_targets_share_passes(self, count, dtype):
        """In segments and copies, each of which is a sequence."""
        model = tiny_model("llama", vocab_size=len(TOKENIZER), dtype=dtype)
        llm_attr = wrapped("integrated-gradients", model)
        for units, steps in (("sentence", 1), ("token", 1), ("token", 6)):
            took, most, result = ask(
                llm_attr, target=TARGET * count, units=units, n_steps=steps
            )
            assert took <= most
        assert most <= 9 * (2 if result.graph.n_generated > 64 else 1) * (
            steps + 1024 // len(TOKENIZER.encode(PROMPT))
        )

    @pytest.mark.parametrize("strategy", ["fused", "loop"])
    @pytest.mark.parametrize(
        ("name", "question"),
        [
            ("ablation", {"foil": {"18": "9"}}),
            ("ablation", {"foil": {0: "It", "18": "9"}, "units": "word"}),
            ("ablation", {"num_trials": 2}),
            ("integrated-gradients", {"foil": {"18": "9"}}),
            ("integrated-gradients", {"tolerance": 0.2, "units": "word"}),
            ("integrated-gradients", {"tolerance": 0.01, "foil": {"18": "9"}}),
            ("shapley-sampling", {"draws": 3}),
            ("shapley-sampling", {"draws": 2, "foil": {"18": "9"}, "num_trials": 2}),
            ("lime", {"foil": {"18": "9"}, "num_trials": 2}),
            ("kernel-shap", {"num_trials": 3}),
            ("c-lime", {"num_trials": 2, "foil": {"18": "9"}}),
            ("ifr", {"tolerance": 0.2, "units": "token"}),
            ("gradient-shap", {"draws": 2, "tolerance": 0.0}),
        ],
    )
    def test_of_every_question(self, name, question, strategy):
        """With foils, draws and trials, and with rows left out."""
        if name in ("lime", "kernel-shap"):
            pytest.importorskip("sklearn")
        model = tiny_model("llama", vocab_size=len(TOKENIZER))
        llm_attr = wrapped(name, model)
        question = {"explain": None if "foil" in question else -1, **question}
        took, most, result = ask(
            llm_attr, strategy=strategy, **question, **arguments(name)
        )
        assert 0 < took <= most
        to = "token" if "units" in question else in_two
        if question.get("units") == "token":
            return
        told = result.refine(1, to, side="both").meta["refined"]
        assert 0 < told["sequences"] <= told["estimated_sequences"]

    def test_several_baselines_are_passes_of_their_own(self):
        """Each is embedded once."""
        model = tiny_model("llama", vocab_size=len(TOKENIZER))
        inp = TextTokenInput(PROMPT, TOKENIZER)
        baselines = torch.zeros((12, inp.n_itp_features))
        for strategy in ("fused", "loop"):
            took, most, _ = ask(
                wrapped("gradient-shap", model),
                inp,
                strategy=strategy,
                baselines=baselines,
                n_samples=2,
            )
            assert 12 < took <= most

    def test_samples_that_rows_do_not_share_are_counted_for_each(self):
        """A Lime that draws in its own way, over units of one token."""
        pytest.importorskip("sklearn")
        model = tiny_model("llama", vocab_size=len(TOKENIZER))

        def draw(data: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.bernoulli(torch.full(data.shape, 0.7)).long()

        method = Lime(model)
        method.perturb_func = draw
        took, most, _ = ask(
            LLMAttribution(method, TOKENIZER), units="token", n_samples=6
        )
        assert took <= most

    def test_inputs_besides_ids_are_scored_token_by_token(self, vision_model):
        """As Captum must; in a batch of its own each."""
        for strategy in ("fused", "loop"):
            for name in ("ablation", "shapley-sampling"):
                took, most, _ = ask(
                    wrapped(name, vision_model),
                    image_input(TOKENIZER),
                    strategy=strategy,
                    **arguments(name),
                )
                assert took <= most

    @pytest.mark.parametrize("strategy", ["fused", "loop"])
    def test_traces_have_rows_of_generated_units_only(self, strategy):
        """Turns from outside are units before them."""
        model = tiny_model("llama", vocab_size=len(TOKENIZER))
        messages = [
            {"role": "user", "content": "Ana has 3. Mia has 4."},
            {"role": "assistant", "content": "So she has 7. Third."},
            {"role": "tool", "content": "It is 18. Write it."},
            {"role": "assistant", "content": "Second. It is 18."},
        ]
        inp = ChatTraceInput(messages, TOKENIZER)
        for name in ("ablation", "integrated-gradients", "c-lime", "clp"):
            took, most, _ = ask(
                wrapped(name, model), inp, strategy=strategy, **arguments(name)
            )
            assert took <= most

    @pytest.mark.parametrize("name", ["ablation", "gradient-x-activation"])
    def test_a_model_that_suits_no_engine_is_counted_by_the_loop(self, name):
        """The engine looks at it each time, though."""
        model = tiny_model("llama", vocab_size=len(TOKENIZER))
        plain = model.forward

        def forward(input_ids: torch.Tensor, **more: Any) -> Any:
            found = plain(input_ids=input_ids, **more)
            found.logits = found.logits * (1 + 0.02 * input_ids.shape[1])
            return found

        model.forward = forward
        question = {"foil": {"18": "9"}, "explain": slice(None)}
        took, most, result = ask(wrapped(name, model), **question)
        assert result.meta["strategy"] == "loop"
        assert took <= most
        told = result.refine(1, in_two).meta["refined"]
        assert told["sequences"] <= told["estimated_sequences"]

    def test_the_estimate_draws_no_random_numbers(self):
        """The same samples come afterwards."""
        model = tiny_model("llama", vocab_size=len(TOKENIZER))
        _, _, result = ask(wrapped("c-lime", model), units="word")
        before = torch.get_rng_state()
        assert estimate(result) == estimate(result)
        assert torch.equal(torch.get_rng_state(), before)

    def test_units_that_are_never_taken_away_need_no_sets(self):
        """Where none may be absent, nothing is drawn."""
        model = tiny_model("llama", vocab_size=len(TOKENIZER))
        took, most, _ = ask(
            wrapped("c-lime", model), never_perturb=[0, 1, 2, 3], explain=-1
        )
        assert took <= most

    def test_a_method_that_is_not_listed_has_none(self):
        """Nothing is known of it."""

        class Mine(FeatureAblation):
            pass

        model = tiny_model("llama", vocab_size=len(TOKENIZER))
        cage = GraphContextAttribution(LLMAttribution(Mine(model), TOKENIZER))
        inp = TextTokenInput(PROMPT, TOKENIZER)
        assert estimate(cage.attribute(inp, TARGET, units="sentence")) is None

    def test_every_method_has_formulas(self):
        """One for the loop, and one for its engine where it has one."""
        assert set(cost._LOOPS) == set(NAMES)
        with_engine = {
            declared.name
            for method, declared in capabilities()
            if method.__name__ in engine_names()
        }
        assert set(cost._ENGINES) == with_engine


class TestCounting:
    """Hooks see every sequence, however the model is called."""

    @pytest.fixture
    def llm_attr(self, fresh_model, tokenizer):
        """Ablation of a model that a test may change."""
        return LLMAttribution(FeatureAblation(fresh_model), tokenizer)

    @pytest.mark.parametrize("architecture", list(ARCHITECTURES))
    def test_sequences_of_a_batch_count_each(self, architecture):
        """Called as a module or past its hooks, by name, place, or embeddings."""
        model = tiny_model(architecture, vocab_size=len(TOKENIZER))
        llm_attr = LLMAttribution(FeatureAblation(model), TOKENIZER)
        ids = torch.arange(12).reshape(3, 4)
        embedded = model.get_input_embeddings()(ids)
        calls = [
            lambda: model(ids),
            lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)),
            lambda: model.forward(ids),
            lambda: model.forward(input_ids=ids, use_cache=False),
            lambda: model(inputs_embeds=embedded),
            lambda: model.forward(None, inputs_embeds=embedded),
        ]
        for number, call in enumerate(calls):
            with count_sequences(llm_attr) as counted, torch.no_grad():
                assert counted == Counted(0, 0)
                call()
                assert counted == Counted(3, 12), number
                call()
            assert counted == Counted(6, 24), number

    def test_tokens_of_a_cached_pass_are_the_new_ones(self, llm_attr):
        """What stands in the cache is not read again."""
        model: Any = llm_attr.model
        ids = torch.arange(10)[None]
        with count_sequences(llm_attr) as counted, torch.no_grad():
            cache = DynamicCache()
            model(ids[:, :7], past_key_values=cache, use_cache=True)
            model(ids[:, 7:], past_key_values=cache, use_cache=True)
        assert counted == Counted(2, 10)
        with count_sequences(llm_attr) as counted:
            model.generate(ids, max_new_tokens=4, do_sample=False)
        assert counted == Counted(4, 13)

    def test_gradient_methods_are_counted_in_full(self, fresh_model, tokenizer):
        """All points at once are as many sequences."""
        method = LayerIntegratedGradients(
            fresh_model, fresh_model.get_input_embeddings()
        )
        llm_attr = LLMGradientAttribution(method, tokenizer)
        inp = TextTokenInput(PROMPT, tokenizer)
        length = inp.inp_tensor.shape[1]
        with count_sequences(llm_attr) as counted:
            llm_attr.attribute(inp, target=torch.tensor([5]), n_steps=7)
        # The layer at both ends, and the points between.
        assert counted == Counted(9, 9 * length)

    def test_the_loop_of_ablation_is_a_pass_for_each_unit(self, llm_attr):
        """And one for the plain text, in each row; the scores are one more."""
        took, _, result = ask(llm_attr, strategy="loop")
        before = result.graph.generated_units.tolist()
        assert took == sum(count + 1 for count in before) + 1

    def test_the_engine_of_ablation_is_a_pass_for_each_unit_but_the_last(
        self, llm_attr
    ):
        """And one for the plain text, once it is known that the model suits."""
        took, most, result = ask(llm_attr)
        assert took == len(result.units) - 1 + 1
        assert took < most <= took + 4

    def test_nothing_is_left_behind(self, llm_attr):
        """No hook, after an exception neither, and what comes later is not counted."""
        model: Any = llm_attr.model
        ids = torch.arange(4)[None]

        def hooks() -> list[int]:
            return [
                len(m._forward_pre_hooks) + len(m._forward_hooks)
                for m in model.modules()
            ]

        before = hooks()
        seen: list[Counted] = []

        def fail() -> None:
            with count_sequences(llm_attr) as counted:
                seen.append(counted)
                model(ids)
                assert hooks() != before
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert hooks() == before
        model(ids)
        assert seen == [Counted(1, 4)]

    def test_counts_within_counts(self, llm_attr):
        """Each sees its own block."""
        model: Any = llm_attr.model
        ids = torch.arange(4)[None]
        with count_sequences(llm_attr) as outer:
            model(ids)
            with count_sequences(llm_attr) as inner:
                model(ids)
        assert (outer.sequences, inner.sequences) == (2, 1)

    def test_a_model_of_images_is_counted(self, vision_model):
        """Once for each pass, not for each of its parts."""
        llm_attr = LLMAttribution(FeatureAblation(vision_model), TOKENIZER)
        inputs = image_input(TOKENIZER).to_model_input()
        with count_sequences(llm_attr) as counted, torch.no_grad():
            vision_model(**inputs)
            vision_model.forward(**inputs)
        length = inputs["input_ids"].shape[1]
        assert counted == Counted(2, 2 * length)

    def test_a_module_without_a_base_model_is_counted_by_its_embeddings(
        self, tokenizer
    ):
        """As models of one's own are."""

        class Plain(nn.Module):
            device = torch.device("cpu")

            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(len(tokenizer), 4)

            def get_input_embeddings(self) -> nn.Module:
                return self.embed

            def forward(self, ids: torch.Tensor) -> torch.Tensor:
                return self.embed(ids)

        model = Plain()
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
        with count_sequences(llm_attr) as counted:
            model.forward(torch.ones((2, 5), dtype=torch.long))
        assert counted == Counted(2, 10)

    def test_what_cannot_be_seen_is_not_counted(self, model, tokenizer):
        """A remote model, and a module that does not say where it begins."""
        remote = RemoteLLMAttribution(
            FeatureAblation(RemoteLLMAttribution.placeholder_model),
            tokenizer,
            LocalProvider(model, tokenizer),
        )
        inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
        cage = GraphContextAttribution(remote)
        with count_sequences(cage.llm_attr) as counted:
            result = cage.attribute(inp, " So she has", units={"generated": "message"})
        assert counted == Counted(None, None)
        assert estimate(result) > 0
        hidden = nn.Linear(2, 2)
        hidden.device = torch.device("cpu")
        with count_sequences(LLMAttribution(KernelShap(hidden), tokenizer)) as counted:
            hidden(torch.ones(1, 2))
        assert counted == Counted(None, None)
