"""The laws of base methods: those of the package keep them, broken ones are told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    ShapleyValueSampling,
)

from captum_cage.engines import Engine
from captum_cage.engines.registry import _engines
from captum_cage.methods import AttnLRP, LShap, MeanAttention, TokenMethod
from captum_cage.rows import loop_row
from captum_cage.testing import METHOD_LAWS, LawsBroken, check_attribution_method
from captum_cage.testing import methods as methods_module

ONE = [("llama", "bpe")]


class Plain(FeatureAblation):
    """A downstream method without an engine."""


def changed(change):
    """A class whose attributions a function changes."""

    class Changed(FeatureAblation):
        calls = 0

        def attribute(self, inputs, additional_forward_args=None, **kwargs):
            type(self).calls += 1
            found = super().attribute(
                inputs, additional_forward_args=additional_forward_args, **kwargs
            )
            return change(found, self, additional_forward_args)

    return Changed


def model_of(method):
    """The model that Captum's object asks."""
    return method.forward_func.__self__.model


def left_in_training(found, method, _):
    """The mode is changed."""
    model_of(method).train()
    return found


def left_hooked(found, method, _):
    """A hook is left behind."""
    model_of(method).lm_head.register_forward_hook(lambda *_: None)
    return found


def left_gradients(found, method, _):
    """Gradients are added to the model's."""
    with torch.enable_grad():
        model_of(method)(torch.tensor([[1, 2]])).logits.sum().backward()
    return found


def left_another_attention(found, method, _):
    """Attention is computed in another way."""
    model_of(method).set_attn_implementation("eager")
    return found


def left_another_weight(found, method, _):
    """A weight is written to."""
    with torch.no_grad():
        model_of(method).lm_head.weight[0, 0] += 1
    return found


def left_frozen(found, method, _):
    """A parameter no longer takes a gradient."""
    model_of(method).lm_head.weight.requires_grad_(False)
    return found


def counted(found, method, _):
    """Something is kept from one call to the next."""
    return found + 0.1 * type(method).calls


def seeded(found, *_):
    """The global generator is seeded."""
    torch.manual_seed(3)
    return found


def with_noise(found, *_):
    """A generator of its own that nobody can seed."""
    return found + torch.from_numpy(np.random.default_rng().random(found.shape))


def fails(*_):
    """It cannot do it."""
    raise RuntimeError("no such layer")


def without_a_number(found, *_):
    """NaN."""
    found[..., 1] = torch.nan
    return found


BROKEN = {
    "an error": ("runs", fails, r"RuntimeError: no such layer"),
    "too few": ("shape", lambda found, *_: found[:, :-1], r"\(2, 3\)"),
    "the sum alone": ("shape", lambda found, *_: found[:1], r"\(1, 4\)"),
    "NaN": ("finiteness", without_a_number, r"row 0 .*, unit 1 \(.*nan"),
    "state": ("causality", counted, r"keep nothing\s+from one call"),
    "noise": ("determinism", with_noise, "off by .* of the largest entry"),
    "a seed": ("random state", seeded, "Torch's random state.*it was set"),
    "the mode": ("model unchanged", left_in_training, "evaluation and is training"),
    "a hook": ("model unchanged", left_hooked, "forward hooks of lm_head was 0 and"),
    "gradients": ("model unchanged", left_gradients, "gradient of parameter"),
    "attention": ("model unchanged", left_another_attention, "attention impl.*eager"),
    "a weight": ("model unchanged", left_another_weight, "value of parameter lm_head"),
    "frozen": ("model unchanged", left_frozen, "requires_grad of parameter lm_head"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_is_told(name):
    """The law, what came, and where."""
    law, change, pattern = BROKEN[name]
    with pytest.raises(LawsBroken, match=rf"(?s)1 law, it is broken.*{pattern}"):
        check_attribution_method(changed(change), laws=[law], cases=ONE)


def test_rows_of_another_shape_are_told_by_the_shape():
    """And not as an error that NumPy or Torch raises somewhere behind."""
    with pytest.raises(LawsBroken) as caught:
        check_attribution_method(
            changed(lambda found, *_: found[:, :-1]), laws=["runs", "shape"], cases=ONE
        )
    assert [finding.law for finding in caught.value.report.broken] == ["shape"]


def test_rows_that_are_not_finite_are_told_once():
    """The same NaN in both rows that are compared breaks no other law."""
    with pytest.raises(LawsBroken) as caught:
        check_attribution_method(changed(without_a_number), cases=ONE)
    assert [finding.law for finding in caught.value.report.broken] == ["finiteness"]


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda m: m.seen.append(1), r"seen of the base method was \[\] and is \[1"),
        (lambda m: setattr(m.tokenizer, "padding_side", "left"), "padding_side of the"),
    ],
)
def test_changed_objects_are_told(change, pattern):
    """The method's own, and the tokenizer."""

    class Keeping(FeatureAblation):
        def attribute(self, inputs, additional_forward_args=None, **kwargs):
            change(self)
            return super().attribute(
                inputs, additional_forward_args=additional_forward_args, **kwargs
            )

    def factory(model, tokenizer):
        method = Keeping(model)
        method.seen, method.tokenizer = [], tokenizer
        return method

    with pytest.raises(LawsBroken, match=pattern):
        check_attribution_method(factory, laws=["objects unchanged"], cases=ONE)


def test_a_changed_input_is_told():
    """Its labels, here."""
    trial = methods_module.made_trial(Plain, ONE[0], 0, None, {})
    trial.check_objects()
    trial.inp.values.append("x")
    with pytest.raises(methods_module.Broken, match="came values of the input was"):
        trial.check_objects()


def test_text_that_is_tokenised_again_is_told():
    """With the text; ids that happen to be the same are no excuse."""

    class Reading(FeatureAblation):
        def attribute(self, inputs, additional_forward_args=None, **kwargs):
            ids = additional_forward_args[0].to_model_input()[0]
            self.tokenizer(self.tokenizer.decode(ids))
            return super().attribute(
                inputs, additional_forward_args=additional_forward_args, **kwargs
            )

    def factory(model, tokenizer):
        method = Reading(model)
        method.tokenizer = tokenizer
        return method

    with pytest.raises(LawsBroken, match=r"(?s)no text of the prompt.*'.+Use the ids"):
        check_attribution_method(factory, laws=["ids never re-tokenised"], cases=ONE)


def test_a_row_that_depends_on_the_grouping_is_told():
    """Here by what was called before."""

    class Counting(TokenMethod):
        calls = 0

        def rows(self, ids, targets):
            type(self).calls += 1
            return torch.full((len(targets), len(ids)), 0.1 * self.calls)

    with pytest.raises(LawsBroken, match="sum of the tokens' rows"):
        check_attribution_method(Counting, laws=["group then solve"], cases=ONE)


@pytest.mark.parametrize("law", ["result", "conservation"])
def test_a_result_that_breaks_its_laws_is_told(monkeypatch, law):
    """With the law of the result."""
    made = methods_module._explained

    def tampered(trial, normalization):
        result = made(trial, normalization)
        result.seq_attr = result.seq_attr + 0.5
        return result

    monkeypatch.setattr(methods_module, "_explained", tampered)
    with pytest.raises(LawsBroken, match=r"law 'conservation' of\s+check_result"):
        check_attribution_method(Plain, laws=[law], cases=ONE)


def test_a_wrong_engine_is_told(monkeypatch):
    """The one that is registered for the method."""

    def rows(task, steps):
        for step in steps:
            yield 2 * loop_row(task, step)

    monkeypatch.setitem(_engines, Plain, Engine(rows))
    with pytest.raises(LawsBroken, match="the loop's row"):
        check_attribution_method(Plain, laws=["equality to the loop"], cases=ONE)


def test_a_method_without_an_engine_has_nothing_to_equal():
    """That law is not applicable, with the reason; all others hold."""
    report = check_attribution_method(Plain, cases=ONE)
    verdicts = {f.law: (f.verdict, f.reason) for f in report.findings}
    assert tuple(verdicts) == METHOD_LAWS
    left_out = {law: reason for law, (verdict, reason) in verdicts.items() if reason}
    assert left_out == {
        "group then solve": "perturbation methods replace a unit as a whole",
        "equality to the loop": "Plain has no engine",
    }


FACTORIES = {
    "a class": LayerGradientXActivation,
    "a name": "mean-attention",
    "of a model": lambda model: LayerIntegratedGradients(
        model, model.get_input_embeddings()
    ),
    "a perturbation method": lambda model: FeatureAblation(model),
    "of model and tokenizer": lambda model, tokenizer: LLMAttribution(
        LShap(model), tokenizer
    ),
    "a gradient object": lambda model, tokenizer: LLMGradientAttribution(
        AttnLRP(model), tokenizer
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_whatever_makes_a_method_is_taken(name):
    """A class, a name, functions; what is bare is wrapped."""
    laws = ["runs", "shape", "finiteness", "causality", "model unchanged"]
    arguments = {"n_steps": 3} if name == "of a model" else {}
    report = check_attribution_method(
        FACTORIES[name], laws=laws, cases=ONE, **arguments
    )
    assert [f.verdict for f in report.findings] == ["pass"] * 5


def test_three_models_and_tokenizers_are_tried():
    """And every law holds for a method of the package."""
    report = check_attribution_method(MeanAttention)
    assert {finding.verdict for finding in report.findings} == {"pass"}


def test_a_random_method_passes():
    """Its engine in the mean; drawing is not seeding."""
    laws = ["determinism", "random state", "equality to the loop"]
    report = check_attribution_method(
        ShapleyValueSampling, laws=laws, cases=ONE, repeats=6, n_samples=1
    )
    assert [finding.verdict for finding in report.findings] == ["pass"] * 3


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"factory": 3}, TypeError, "factory: must be the class .* int 3 came"),
        ({"factory": lambda model: model}, TypeError, "came from it"),
        ({"factory": lambda: 3}, TypeError, "factory: must be the class"),
        ({"factory": Plain, "laws": ["no"]}, ValueError, "laws: .* 'no' came"),
        ({"factory": Plain, "laws": "runs"}, TypeError, "laws: must be several names"),
        ({"factory": Plain, "laws": []}, ValueError, "laws: must name a law"),
        ({"factory": Plain, "cases": ["llama"]}, ValueError, "cases: must be pairs"),
        ({"factory": Plain, "cases": [("no", "bpe")]}, ValueError, "arch: must be"),
        ({"factory": Plain, "cases": []}, ValueError, "cases: must have a case"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, match):
    """With what to pass."""
    with pytest.raises(error, match=match):
        check_attribution_method(**arguments)
