"""On a GPU: engines, questions and interventions follow the model's device.

Skipped where there is none.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

from captum_cage import ChatTraceInput, GraphContextAttribution, Part
from captum_cage.demo import load_demo, sample_problems
from captum_cage.demo.planted import planted_cases, planted_model
from captum_cage.methods.catalogue import capabilities, llm_attribution
from captum_cage.testing import check_engine
from test_methods_reagent import masked
from tiny import image_input, tiny_model, tiny_tokenizer, tiny_vision_model

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device"
)

PROMPT = "Ana has 3 pens."
ANSWER = " Mia has 7."


@pytest.fixture(scope="module")
def small():
    """A small model on the GPU, and its tokenizer."""
    tokenizer = tiny_tokenizer("bpe")
    return tiny_model("llama", vocab_size=len(tokenizer)).double().cuda(), tokenizer


@pytest.mark.parametrize(
    "declared",
    [d for _, d in capabilities() if d.name != "reagent"],
    ids=lambda d: d.name,
)
def test_every_engine_gives_the_loop_s_rows(declared, small):
    """As on the CPU."""
    model, tokenizer = small
    options, kwargs, units = {}, {}, "token"
    if declared.extra is not None:
        pytest.importorskip("sklearn")
    if declared.name == "one-shot-reagent":
        masked_lm, masked_tokenizer = masked("bert")
        options = {"masked_lm": masked_lm.cuda(), "masked_tokenizer": masked_tokenizer}
    if declared.counted == "n_samples":
        kwargs["n_samples"] = 4
    if declared.name == "shapley":
        units = {"source": "word", "generated": "sentence"}
    llm_attr = llm_attribution(declared.name, model, tokenizer, **options)
    tolerance = 1e-5 if declared.name == "shapley" else None
    report = check_engine(
        llm_attr,
        TextTokenInput(PROMPT, tokenizer),
        ANSWER,
        units=units,
        tolerance=tolerance,
        repeats=8 if declared.random else 1,
        **kwargs,
    )
    assert report.difference <= report.allowed
    if declared.name == "one-shot-reagent":
        masked_lm.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_are_those_of_the_cpu(dtype, attention):
    """Within what the number type can hold."""
    tokenizer = tiny_tokenizer("bpe")
    rows = []
    for place in ("cpu", "cuda"):
        model = tiny_model("llama", vocab_size=len(tokenizer)).to(place)
        model.set_attn_implementation(attention)
        if place == "cuda":
            model = model.to(dtype)
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        result = cage.attribute(TextTokenInput(PROMPT, tokenizer), ANSWER)
        assert result.seq_attr.device.type == "cpu"
        rows.append(result.graph.rows)
    largest = np.abs(rows[0]).max()
    allowed = 1e-4 if dtype == torch.float32 else 0.1
    assert np.abs(rows[1] - rows[0]).max() <= allowed * largest


def test_every_question_is_answered():
    """Foils, finer units, alternatives, paths, intervals, parts."""
    model, tokenizer = load_demo()
    model = model.cuda()
    problem = sample_problems(1, seed=1, kind="two_questions")[0]
    inp = TextTokenInput(problem.prompt, tokenizer)
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    answer = problem.answers[0]
    result = cage.attribute(
        inp, problem.completion, units="sentence", explain=answer.text
    )
    number = answer.text.split()[-1].rstrip(".")
    assert result.alternatives(number, k=1)[0].text.strip() == number
    assert result.verify_path(result.paths(1)[0]).holds
    assert len(result.refine(top=1, to="token").units) > len(result.units)
    foil = cage.attribute(
        inp, problem.completion, units="sentence", foil={number: "98"}
    )
    assert foil.verify_path(foil.paths(1)[0]).holds
    thought = cage.attribute(
        inp, problem.completion, units="sentence", think=(0, 20), explain=Part.ANSWER
    )
    assert 0 <= thought.share_through() <= 1 + 1e-9
    sampled = llm_attribution("gradient-shap", model, tokenizer)
    drawn = GraphContextAttribution(sampled).attribute(
        inp, problem.completion, units="sentence", draws=2, n_samples=2
    )
    assert np.isfinite(drawn.intervals(resamples=10).standard_error).all()


def test_traces_and_images():
    """Turns from outside; the parts of a picture."""
    model, tokenizer = planted_model("trace")
    case = planted_cases(1, seed=0, kind="trace")[0]
    cage = GraphContextAttribution(
        LLMAttribution(FeatureAblation(model.cuda()), tokenizer)
    )
    result = cage.attribute(ChatTraceInput(case.messages, tokenizer), units="sentence")
    assert result.seq_attr.isfinite().all()
    tokenizer = tiny_tokenizer("bpe")
    vision = tiny_vision_model(len(tokenizer)).cuda()
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(vision), tokenizer))
    seen = cage.attribute(image_input(tokenizer), ANSWER)
    assert seen.verify_path([len(seen.units) - 1, 0]).kind == "direct"
    assert seen.alternatives(k=2)
