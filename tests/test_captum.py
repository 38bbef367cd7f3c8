"""The wrapper keeps clear of Captum's defects, and hands over what Captum computes."""

from __future__ import annotations

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    InputXGradient,
    KernelShap,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    LLMAttribution,
    LLMGradientAttribution,
    ShapleyValues,
    ShapleyValueSampling,
    TextTokenInput,
)

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage._captum import (
    attribute_unit,
    check_attribution_object,
    check_kwargs,
    check_longest_row,
    check_shortest_row,
)
from conftest import PROMPT, TARGET
from tiny import tiny_model, tiny_tokenizer


def plain_log_probs(model, ids, start):
    """Log-probability of each id from ``start`` on, by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    scores = torch.log_softmax(logits.double(), dim=-1)
    return [float(scores[i - 1, ids[i]]) for i in range(start, len(ids))]


@pytest.mark.parametrize(
    ("arch", "units"),
    [
        *((arch, "token") for arch in ("llama", "gpt2", "qwen3", "gemma3")),
        ("gemma3", "sentence"),
    ],
)
def test_every_row_starts_from_the_log_probability_of_a_plain_forward(arch, units):
    """Defect 1: with the key-value cache all targets but the first are wrong."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(arch, vocab_size=len(tokenizer))
    prompt, target = tokenizer.encode(PROMPT), tokenizer.encode(TARGET)
    ids = prompt + target
    seen = []

    def recorded(**inputs):
        outputs = type(model).forward(model, **inputs)
        if outputs.logits.shape[:2] != inputs["input_ids"].shape:
            return outputs  # for output_probs, which needs no logits of the prompt
        scores = torch.log_softmax(outputs.logits[0].double(), dim=-1)
        given = inputs["input_ids"][0].tolist()
        seen.append(
            (given, [float(scores[i - 1, given[i]]) for i in range(1, len(given))])
        )
        return outputs

    model.forward = recorded
    attribution = LLMAttribution(FeatureAblation(model), tokenizer)
    cage = GraphContextAttribution(attribution)
    result = cage.attribute(
        TextTokenInput(PROMPT, tokenizer), target, units=units, strategy="loop"
    )
    del model.forward

    expected = plain_log_probs(model, ids, len(prompt))
    rows_seen = 0
    for given, scores in seen:
        if given == ids[: len(given)]:
            rows_seen += 1
            assert scores[len(prompt) - 1 :] == pytest.approx(
                expected[: len(given) - len(prompt)], abs=1e-5
            )
    assert rows_seen == result.graph.n_generated
    if units == "token":
        assert result.output_probs.log().tolist() == pytest.approx(expected, abs=1e-5)


def test_raw_rows_are_the_differences_of_plain_forwards(model, tokenizer):
    """Defect 1, seen from the outside: each entry is a drop in log-probability."""
    prompt, target = tokenizer.encode(PROMPT), tokenizer.encode(TARGET)
    ids = prompt + target
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    cage = GraphContextAttribution(llm_attr)
    rows = cage.attribute(TextTokenInput(PROMPT, tokenizer), target).graph.rows
    base = plain_log_probs(model, ids, len(prompt))
    for j in range(len(ids)):
        changed = [*ids[:j], 0, *ids[j + 1 :]]
        ablated = plain_log_probs(model, changed, len(prompt))
        for t in range(len(target)):
            drop = base[t] - ablated[t] if j < len(prompt) + t else 0.0
            assert rows[t, j] == pytest.approx(drop, abs=1e-5)


def test_gradient_shap_rows_are_those_of_one_token_calls(model, tokenizer):
    """Defect 3: rows after the first get the prefix and target of another row."""
    prompt, target = tokenizer.encode(PROMPT), tokenizer.encode(TARGET)[:4]
    layer = model.get_input_embeddings()
    llm_attr = LLMGradientAttribution(LayerGradientShap(model, layer), tokenizer)
    cage = GraphContextAttribution(llm_attr)
    with pytest.warns(UserWarning, match="LayerGradientShap"):
        result = cage.attribute(TextTokenInput(PROMPT, tokenizer), target, n_samples=3)
    # Every sample of Captum's is the baseline, so the truth is one gradient there.
    for t in range(len(target)):
        given = torch.tensor([prompt + target[:t]])
        embedded = layer(torch.zeros_like(given)).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits[0, -1]
        score = torch.log_softmax(logits, -1)[target[t]]
        (gradient,) = torch.autograd.grad(score, embedded)
        expected = (gradient * (layer(given) - embedded)).sum(-1)[0]
        row = torch.from_numpy(result.graph.rows[t, : given.shape[1]].copy())
        torch.testing.assert_close(row, expected.double(), atol=1e-5, rtol=1e-4)


def test_gradient_shap_warns_that_its_samples_do_nothing(model, tokenizer):
    """Defect 4: the user is told, as the numbers look like others."""
    method = LayerGradientShap(model, model.get_input_embeddings())
    llm_attr = LLMGradientAttribution(method, tokenizer)
    with pytest.warns(UserWarning, match="gradient is taken at the baseline"):
        check_kwargs(llm_attr, {})


@pytest.mark.parametrize("text", ["😀", "日本", "é! 😀"])
@pytest.mark.filterwarnings("ignore:Pretty tokens", "ignore:.*Skipping this token")
def test_pieces_of_a_character_are_targets_like_others(model, tokenizer, text):
    """Defect 5: Captum fails on such a target after all its forwards."""
    target = tokenizer.encode(text)
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    inp, piece = TextTokenInput(PROMPT, tokenizer), torch.tensor(target[-1:])
    with pytest.raises(IndexError, match="out of bounds"):
        llm_attr.attribute(inp, piece, use_cached_outputs=False)
    cage = GraphContextAttribution(llm_attr)
    result = cage.attribute(TextTokenInput(PROMPT, tokenizer), target)
    assert result.graph.n_generated == len(target)
    assert result.generated_text == text


def test_more_than_one_perturbation_per_call_is_refused(model, tokenizer):
    """Defect 6: it never works with LLMAttribution."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    with pytest.raises(ValueError, match="perturbations_per_eval: must be 1"):
        check_kwargs(llm_attr, {"perturbations_per_eval": 4})


def test_the_key_value_cache_is_never_used(model, tokenizer):
    """A user who asks for it is told, and gets the right numbers."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    cage = GraphContextAttribution(llm_attr)
    inp = TextTokenInput(PROMPT, tokenizer)
    plain = cage.attribute(inp, TARGET)
    with pytest.warns(UserWarning, match="use_cached_outputs: ignored"):
        asked = cage.attribute(inp, TARGET, use_cached_outputs=True)
    assert (plain.graph.rows == asked.graph.rows).all()


def test_unknown_arguments_are_refused(model, tokenizer):
    """FeatureAblation swallows them silently."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    with pytest.raises(TypeError, match=r"skip_tokens: neither .* takes this argument"):
        check_kwargs(llm_attr, {"skip_tokens": [1]})
    with pytest.raises(TypeError, match="n_samples: neither"):
        check_kwargs(llm_attr, {"n_samples": 10})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("feature_mask", "pass `units=`"),
        ("additional_forward_args", "Captum's LLM attribution fills it"),
        ("return_convergence_delta", "attributions alone"),
    ],
)
def test_arguments_that_are_ours_are_refused_with_the_reason(
    model, tokenizer, name, why
):
    """What the wrapper makes itself cannot be passed."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    with pytest.raises(TypeError, match=f"{name}: is not an argument.*{why}"):
        check_kwargs(llm_attr, {name: None})


@pytest.mark.parametrize("value", [None, "text", object(), FeatureAblation])
def test_only_captum_s_llm_attribution_objects_are_taken(value):
    """Anything else is named, with the remedy."""
    with pytest.raises(TypeError, match=r"llm_attr: must be a LLMAttribution.*Wrap"):
        check_attribution_object(value)


def test_a_bare_attribution_method_is_not_taken(model):
    """A method that was not wrapped for language models is refused."""
    with pytest.raises(TypeError, match=r"llm_attr: .*InputXGradient"):
        GraphContextAttribution(InputXGradient(model))


def test_shapley_values_refuse_too_many_units(model, tokenizer):
    """Their cost is factorial: the count is told before the first call."""
    llm_attr = LLMAttribution(ShapleyValues(model), tokenizer)
    check_longest_row(llm_attr, 7)
    with pytest.raises(ValueError, match=r"at most 7 units.*the last row has 8 units"):
        check_longest_row(llm_attr, 8)


@pytest.mark.parametrize("method", [Lime, KernelShap])
def test_regressions_refuse_a_single_unit(model, tokenizer, method):
    """Their fit fails late in scikit-learn otherwise."""
    llm_attr = LLMAttribution(method(model), tokenizer)
    with pytest.raises(ValueError, match="at least two units"):
        check_shortest_row(llm_attr, 1)


def test_baselines_of_the_prompt_are_extended_to_generated_tokens(model, tokenizer):
    """A tensor for the prompt's features serves every row."""
    layer = model.get_input_embeddings()
    llm_attr = LLMGradientAttribution(LayerIntegratedGradients(model, layer), tokenizer)
    inp = TextTokenInput(PROMPT, tokenizer)
    cage = GraphContextAttribution(llm_attr)
    given = torch.zeros_like(inp.inp_tensor)
    with_tensor = cage.attribute(inp, TARGET, n_steps=2, baselines=given)
    without = cage.attribute(inp, TARGET, n_steps=2)
    assert (with_tensor.graph.rows == without.graph.rows).all()


@pytest.mark.parametrize(
    "method",
    [FeatureAblation, ShapleyValueSampling, Lime, KernelShap, LayerGradientXActivation],
)
def test_one_call_gives_one_score_per_feature(model, tokenizer, method):
    """Also of methods that have no per-token attribution in Captum."""
    if method is LayerGradientXActivation:
        wrapped = method(model, model.get_input_embeddings())
        llm_attr = LLMGradientAttribution(wrapped, tokenizer)
    else:
        llm_attr = LLMAttribution(method(model), tokenizer)
    inp = TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)
    scores = attribute_unit(llm_attr, inp, torch.tensor([5]), {})
    assert scores.shape == (inp.n_itp_features,)
    assert bool(torch.isfinite(scores).all())
