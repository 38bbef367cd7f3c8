"""Attributions of models without what they learned, and asked for again."""

from __future__ import annotations

import itertools
import random
from typing import Any

import captum.metrics
import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    RemoteLLMAttribution,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)
from scipy.stats import spearmanr
from torch import nn

from captum_cage import GraphAttributionResult, GraphContextAttribution
from captum_cage.metrics import (
    Randomization,
    parameter_randomization,
    randomized,
    reproducibility,
    sanity,
    sensitivity,
)
from conftest import PROMPT, TARGET
from tiny import ForwardOnly, LocalProvider, tiny_model


def explained(
    model: Any, tokenizer: Any, method: Any = FeatureAblation, **options: Any
) -> GraphAttributionResult:
    """The last sentence of a small text, explained over words of the prompt."""
    llm_attr = LLMAttribution(method(model), tokenizer)
    cage = GraphContextAttribution(llm_attr, normalization="absolute")
    return cage.attribute(
        TextTokenInput(PROMPT, tokenizer),
        TARGET,
        units={"source": "word", "generated": "sentence"},
        explain=-1,
        **options,
    )


class ByPosition(FeatureAblation):
    """A method that looks at no model: the later, the more."""

    def attribute(self, *args: Any, **kwargs: Any) -> Any:
        """Scores of positions, where those of ablation would be."""
        found = super().attribute(*args, **kwargs)
        return torch.arange(1.0, found.shape[-1] + 1).expand_as(found)


class Constant(FeatureAblation):
    """A method that finds everything the same."""

    def attribute(self, *args: Any, **kwargs: Any) -> Any:
        """Ones."""
        return torch.ones_like(super().attribute(*args, **kwargs))


class Failing(FeatureAblation):
    """A method that breaks after it drew a number."""

    broken = False

    def attribute(self, *args: Any, **kwargs: Any) -> Any:
        """Scores of ablation, until it breaks."""
        if self.broken:
            torch.rand(1)
            np.random.rand()  # noqa: NPY002
            raise RuntimeError("broken")
        return super().attribute(*args, **kwargs)


def bits(model: nn.Module) -> dict[str, Any]:
    """Every weight, and where it is."""
    return {
        name: (one.data_ptr(), one.dtype, one.detach().clone())
        for name, one in [*model.named_parameters(remove_duplicate=False)]
    }


def assert_the_very(before: dict[str, Any], model: nn.Module) -> None:
    """The same numbers in the same place, bit by bit."""
    after = bits(model)
    assert after.keys() == before.keys()
    for name, (place, dtype, numbers) in after.items():
        assert (place, dtype) == before[name][:2], name
        assert torch.equal(numbers, before[name][2]), name


class Mixed(nn.Module):
    """Weights of several kinds, some of them tied."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            weight = nn.Parameter(torch.randn(5, 7).to(dtype))
            self.register_parameter(f"of_{name}", weight)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        whole = torch.arange(12, dtype=torch.int8)
        self.whole = nn.Parameter(whole, requires_grad=False)
        self.register_buffer("mean", torch.randn(4))


# --- shuffled weights ----------------------------------------------------------------


class TestRandomized:
    """Weights are shuffled for a while."""

    def test_the_very_weights_come_back(self):
        """Of every type, tied ones too; buffers and whole numbers stay all along."""
        model = Mixed()
        before = bits(model)
        mean = model.mean.clone()
        with randomized(model, 3):
            for name, one in model.named_parameters():
                own = before[name][2]
                if one.is_floating_point():
                    assert not torch.equal(one, own), name
                    # The same numbers in another order.
                    assert torch.equal(
                        one.detach().flatten().sort().values,
                        own.flatten().sort().values,
                    )
                else:
                    assert torch.equal(one, own)
            assert model.second.weight is model.first.weight
            assert torch.equal(model.mean, mean)
        assert_the_very(before, model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_also_of_a_language_model_with_tied_embeddings(self, tokenizer, dtype):
        """And its predictions with them."""
        model = tiny_model(
            "llama", vocab_size=len(tokenizer), dtype=dtype, tie_word_embeddings=True
        )
        assert model.lm_head.weight is model.model.embed_tokens.weight
        before = bits(model)
        ids = torch.tensor([tokenizer.encode(PROMPT)])
        with torch.no_grad():
            plain = model(ids).logits
            with randomized(model):
                assert not torch.allclose(model(ids).logits, plain)
            assert torch.equal(model(ids).logits, plain)
        assert_the_very(before, model)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_also_after_an_exception(self):
        """Whatever it is."""
        model = Mixed()
        before = bits(model)
        with pytest.raises(KeyboardInterrupt), randomized(model):
            raise KeyboardInterrupt
        assert_the_very(before, model)

    def test_also_where_they_were_changed_meanwhile(self):
        """The weights are those from before."""
        model = Mixed()
        before = bits(model)
        with randomized(model), torch.no_grad():
            model.of_float32.zero_()
        assert_the_very(before, model)

    def test_only_some_may_be_shuffled(self):
        """The others are not touched."""
        model = Mixed()
        before = bits(model)
        with randomized(model, parameters=[model.of_float32]):
            for name, one in model.named_parameters():
                assert torch.equal(one, before[name][2]) == (name != "of_float32")
        assert_the_very(before, model)

    def test_the_seed_says_how(self):
        """The same one in the same way, whatever the random state, and that stays."""
        model, found = Mixed(), []
        for seed in (1, 1, 2):
            torch.manual_seed(len(found))
            state = torch.get_rng_state()
            with randomized(model, seed):
                found.append(model.of_float32.detach().clone())
            assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_gradients_and_their_need_stay(self):
        """Nothing is tracked."""
        model = Mixed()
        model.of_float32.requires_grad_(False)
        model.first.weight.grad = torch.ones(6, 6)
        needs = [one.requires_grad for one in model.parameters()]
        with randomized(model):
            assert [one.requires_grad for one in model.parameters()] == needs
        assert torch.equal(model.first.weight.grad, torch.ones(6, 6))
        assert all(one.grad_fn is None for one in model.parameters())


# --- Adebayo's test ------------------------------------------------------------------


class TestParameterRandomization:
    """An attribution that depends on the model changes with it."""

    def test_a_method_that_ignores_the_model_is_caught(self, model, tokenizer):
        """It ranks the sources of any model alike."""
        result = explained(model, tokenizer, ByPosition)
        found = parameter_randomization(result)
        assert found.agreement == pytest.approx([1.0] * len(found.stages))
        assert not found.depends_on_model
        assert str(found).startswith("The attribution does not change when the model's")

    def test_a_real_method_is_not(self, model, tokenizer):
        """Ablation of other weights ranks the sources otherwise."""
        found = parameter_randomization(explained(model, tokenizer), seeds=2)
        assert found.depends_on_model
        assert found.seeds == 2
        assert str(found).startswith("The attribution changes when the model's")
        for stage, value in zip(found.stages, found.agreement, strict=True):
            assert f"\n{stage}: {value:.3f}" in str(found)

    def test_a_method_that_finds_everything_the_same_is_caught(self, model, tokenizer):
        """It has no ranks, and they do not change."""
        result = explained(model, tokenizer, Constant)
        assert np.ptp(result.seq_attr.numpy()) == 0.0
        found = parameter_randomization(result, cascade=False)
        assert found.agreement == (1.0,)
        assert not found.depends_on_model

    def test_weights_are_shuffled_from_the_output_to_the_input(
        self, fresh_model, tokenizer
    ):
        """A layer more each time, with each seed; then they are back."""
        model = fresh_model
        result = explained(model, tokenizer)
        before = bits(model)
        found = parameter_randomization(result, seeds=2)
        assert_the_very(before, model)
        stages = ("output layer", "layer 1", "layer 0", "embeddings and the rest")
        assert found.stages == stages
        groups: list[list[nn.Parameter]] = [
            list(model.lm_head.parameters()),
            list(model.model.layers[1].parameters()),
            list(model.model.layers[0].parameters()),
            [*model.model.embed_tokens.parameters(), *model.model.norm.parameters()],
        ]
        own = result.seq_attr.numpy()
        for number in range(4):
            shuffled = [one for group in groups[: number + 1] for one in group]
            values = []
            for seed in range(2):
                with randomized(model, seed, shuffled):
                    other = explained(model, tokenizer).seq_attr.numpy()
                values.append(spearmanr(own, other).statistic)
            assert found.agreement[number] == pytest.approx(np.mean(values), abs=1e-6)

    def test_all_at_once_is_the_last_stage(self, model, tokenizer):
        """Every weight, in the same order."""
        result = explained(model, tokenizer)
        whole = parameter_randomization(result)
        once = parameter_randomization(result, cascade=False)
        assert once.stages == ("all weights",)
        assert once.agreement == pytest.approx(whole.agreement[-1:])

    def test_a_tied_output_layer_is_an_embedding(self, tokenizer):
        """It is shuffled once, at last."""
        model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True)
        result = explained(model, tokenizer)
        before = bits(model)
        found = parameter_randomization(result)
        assert found.stages == ("layer 1", "layer 0", "embeddings and the rest")
        assert found.depends_on_model
        assert_the_very(before, model)

    def test_weights_come_back_when_the_method_breaks(self, fresh_model, tokenizer):
        """Between two stages."""
        result = explained(fresh_model, tokenizer, Failing)
        before = bits(fresh_model)
        try:
            Failing.broken = True
            with pytest.raises(RuntimeError, match="broken"):
                parameter_randomization(result)
        finally:
            Failing.broken = False
        assert_the_very(before, fresh_model)

    @pytest.mark.parametrize(
        ("last", "depends"),
        [(1.0, False), (0.5, False), (-0.7, False), (0.49, True), (float("nan"), True)],
    )
    def test_half_a_rank_correlation_is_too_much(self, last, depends):
        """With either sign, at the last stage."""
        found = Randomization(("first", "last"), (0.9, last), 1, 0.01)
        assert found.depends_on_model is depends

    def test_so_few_sources_that_chance_does_as_much_tell_nothing(self):
        """And that is said."""
        found = Randomization(("all",), (1.0,), 1, 1.0)
        assert found.depends_on_model
        assert "random rankings of so few sources do so in 100% of cases" in str(found)

    @pytest.mark.parametrize(("size", "seeds"), [(2, 1), (3, 1), (3, 3), (5, 2)])
    def test_chance_is_the_share_of_all_rankings(self, size, seeds):
        """Which agree as much, by counting them."""
        own = np.arange(size, dtype=float)
        rhos = [
            float(np.corrcoef(own, order)[0, 1])
            for order in itertools.permutations(own)
        ]
        means = [np.mean(some) for some in itertools.product(rhos, repeat=seeds)]
        expected = np.mean(np.abs(means) >= 0.6 - 1e-9)
        found = sanity._chance(own, 0.6, seeds, draws=20000)
        assert found == pytest.approx(expected, abs=0.02)

    def test_one_source_has_no_rank(self, model, tokenizer):
        """Smaller units are needed."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        inp = TextTokenInput(PROMPT, tokenizer)
        result = cage.attribute(inp, TARGET, units="message", explain=-1)
        with pytest.raises(ValueError, match="result: must have several sources"):
            parameter_randomization(result)


# --- the same again ------------------------------------------------------------------


class Drawn(FeatureAblation):
    """A method of random numbers, of PyTorch and of NumPy."""

    def attribute(self, *args: Any, **kwargs: Any) -> Any:
        """Scores drawn anew each time."""
        found = super().attribute(*args, **kwargs)
        more = np.random.rand(*found.shape)  # noqa: NPY002
        return torch.rand_like(found) + torch.from_numpy(more)


def states() -> Any:
    """The random states."""
    return (
        torch.get_rng_state().tolist(),
        str(np.random.get_state(legacy=False)),  # noqa: NPY002
        random.getstate(),
    )


class TestReproducibility:
    """The same seed gives the same numbers."""

    @pytest.mark.parametrize(
        "method", [FeatureAblation, ShapleyValueSampling, KernelShap, Drawn]
    )
    def test_methods_that_draw_numbers_start_from_the_seed(
        self, method, model, tokenizer
    ):
        """Of PyTorch and of NumPy."""
        options = (
            {"n_samples": 4} if method in (ShapleyValueSampling, KernelShap) else {}
        )
        result = explained(model, tokenizer, method, **options)
        assert reproducibility(result) == 0.0
        if method is not FeatureAblation:
            assert not torch.equal(result.repeat().seq_attr, result.repeat().seq_attr)

    def test_what_no_seed_governs_is_found(self, model, tokenizer):
        """The largest difference of a source."""
        source = random.Random(0)

        class Restless(FeatureAblation):
            def attribute(self, *args: Any, **kwargs: Any) -> Any:
                return super().attribute(*args, **kwargs) * source.random() ** 9 + 1

        result = explained(model, tokenizer, Restless)
        kept = source.getstate()
        found = reproducibility(result)
        source.setstate(kept)
        one, other = (result.repeat().seq_attr for _ in range(2))
        assert found == pytest.approx(float((one - other).abs().max()))
        assert found > 0.0

    def test_random_states_are_left_as_they_were(self, model, tokenizer):
        """Also after an exception."""
        torch.manual_seed(71)
        np.random.seed(72)  # noqa: NPY002
        result = explained(model, tokenizer, Drawn)
        before = states()
        reproducibility(result)
        assert states() == before
        sensitivity(result, samples=2)
        assert states() == before
        result = explained(model, tokenizer, Failing)
        try:
            Failing.broken = True
            for check in (reproducibility, sensitivity):
                with pytest.raises(RuntimeError, match="broken"):
                    check(result)
                assert states() == before
        finally:
            Failing.broken = False


# --- moved embeddings ----------------------------------------------------------------


class TestSensitivity:
    """How much the result changes when embeddings do."""

    def test_it_is_that_of_captum_with_the_same_moves(self, fresh_model, tokenizer):
        """Written into the embedding of each distinct token of the text."""
        model = fresh_model
        result = explained(model, tokenizer)
        weight = model.model.embed_tokens.weight
        ids = sorted({*tokenizer.encode(PROMPT), *tokenizer.encode(TARGET)})
        scale = 0.3 * float(weight.detach().std())
        torch.manual_seed(5)
        moves = (2 * torch.rand(3, len(ids), weight.shape[1]) - 1) * scale

        def attributed(rows: Any) -> torch.Tensor:
            found = []
            before = weight.detach().clone()
            for row in rows[0] if isinstance(rows, tuple) else rows:
                weight.data[ids] = row
                found.append(explained(model, tokenizer).seq_attr)
                weight.data.copy_(before)
            return (torch.stack(found),)

        expected = captum.metrics.sensitivity_max(
            attributed,
            weight.detach()[ids][None],
            perturb_func=lambda rows: rows + moves,
            n_perturb_samples=3,
        )
        found = sensitivity(result, radius=0.3, samples=3, seed=5)
        assert found == pytest.approx(float(expected), rel=1e-3)
        assert found > 0.01

    def test_larger_moves_find_more(self, model, tokenizer):
        """The same ones with the same seed."""
        result = explained(model, tokenizer)
        small, large = (
            sensitivity(result, radius=radius, samples=4) for radius in (0.001, 0.1)
        )
        assert 0.0 < small < large
        assert sensitivity(result, radius=0.001, samples=4) == small
        assert sensitivity(result, radius=0.001, samples=4, seed=1) != small

    def test_a_method_that_ignores_the_model_does_not_feel_it(self, model, tokenizer):
        """Nor does what a method draws count, as it starts from the seed."""
        for method in (ByPosition, Drawn):
            result = explained(model, tokenizer, method)
            assert sensitivity(result, samples=3) == 0.0

    def test_gradients_feel_it_too(self, model, tokenizer):
        """Whatever way a method reads embeddings."""
        layer = LayerIntegratedGradients(model, model.model.embed_tokens)
        cage = GraphContextAttribution(LLMGradientAttribution(layer, tokenizer))
        inp = TextTokenInput(PROMPT, tokenizer)
        result = cage.attribute(inp, TARGET, units="sentence", explain=-1, n_steps=2)
        assert sensitivity(result, radius=0.1, samples=2) > 0.0

    def test_a_result_without_mass_has_none(self, model, tokenizer):
        """There is nothing that it could be relative to."""

        class Nothing(FeatureAblation):
            def attribute(self, *args: Any, **kwargs: Any) -> Any:
                return torch.zeros_like(super().attribute(*args, **kwargs))

        result = explained(model, tokenizer, Nothing)
        assert np.isnan(sensitivity(result, samples=1))

    def test_the_model_is_left_as_it_was(self, fresh_model, tokenizer):
        """Weights, hooks and training mode."""
        model = fresh_model
        result = explained(model, tokenizer)
        model.train()
        before = bits(model)
        for check in (sensitivity, reproducibility, parameter_randomization):
            check(result)
            assert_the_very(before, model)
            assert all(module.training for module in model.modules())
            assert not any(module._forward_hooks for module in model.modules())
            assert not any(module._forward_pre_hooks for module in model.modules())
            assert all(one.grad is None for one in model.parameters())


# --- refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "options", "error", "match"),
    [
        (parameter_randomization, {"seeds": 0}, ValueError, "seeds: must be 1 or more"),
        (parameter_randomization, {"seeds": 1.5}, TypeError, "seeds: must be a whole"),
        (
            reproducibility,
            {"seed": -1},
            ValueError,
            "seed: must be at least 0 and less",
        ),
        (reproducibility, {"seed": None}, TypeError, "seed: must be a whole number"),
        (sensitivity, {"samples": 0}, ValueError, "samples: must be 1 or more"),
        (sensitivity, {"seed": -1}, ValueError, "seed: must be at least 0 and less"),
        (sensitivity, {"radius": 0.0}, ValueError, "radius: must be a finite number"),
        (sensitivity, {"radius": float("nan")}, ValueError, "radius: must be a finite"),
        (sensitivity, {"radius": float("inf")}, ValueError, "radius: must be a finite"),
        (sensitivity, {"radius": "far"}, ValueError, "radius: must be a finite number"),
        (sensitivity, {"radius": True}, ValueError, "radius: must be a finite number"),
    ],
)
def test_arguments_are_checked(check, options, error, match, model, tokenizer):
    """By name."""
    result = explained(model, tokenizer, ByPosition)
    with pytest.raises(error, match=match):
        check(result, **options)


@pytest.mark.parametrize(
    "check", [parameter_randomization, reproducibility, sensitivity]
)
def test_a_result_without_its_model_is_refused(check, model, tokenizer, tmp_path):
    """One from a file."""
    explained(model, tokenizer).save(tmp_path / "result.npz")
    loaded = GraphAttributionResult.load(tmp_path / "result.npz")
    with pytest.raises(ValueError, match="must ask the model"):
        check(loaded)


@pytest.mark.parametrize("check", [parameter_randomization, sensitivity])
def test_a_remote_model_has_no_weights(check, model, tokenizer):
    """It must be loaded."""
    remote = RemoteLLMAttribution(
        FeatureAblation(RemoteLLMAttribution.placeholder_model),
        tokenizer,
        LocalProvider(model, tokenizer),
    )
    result = GraphContextAttribution(remote).attribute(
        TextTemplateInput("{} has {}.", ["Ana", "3"]), " So she", units="word"
    )
    match = f"{check.__name__}: needs the weights of the model, but the model is remote"
    with pytest.raises(TypeError, match=match):
        check(result)


def test_a_model_without_embeddings_is_refused(model, tokenizer):
    """There is nothing to move."""
    with pytest.raises(TypeError, match="sensitivity: needs a model with embeddings"):
        sensitivity(explained(ForwardOnly(model), tokenizer))
