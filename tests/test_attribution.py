"""The wrapper end to end: what goes in, what comes out, what stays as it was."""

from __future__ import annotations

import copy
import logging
import re
import threading

import numpy as np
import pytest
import torch
from captum.attr import (
    Attribution,
    FeatureAblation,
    KernelShap,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    LLMAttribution,
    LLMAttributionResult,
    LLMGradientAttribution,
    ShapleyValues,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)
from transformers import T5Config, T5ForConditionalGeneration

from captum_cage import ChatTokenInput, GraphContextAttribution, TokenIdsInput
from conftest import PROMPT, TARGET
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer


@pytest.fixture
def cage(model, tokenizer):
    """Ablation of a small Llama."""
    return GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))


@pytest.fixture
def inp(tokenizer):
    """A prompt of two sentences."""
    return TextTokenInput(PROMPT, tokenizer)


def test_the_wrapper_is_a_captum_attribution(cage, inp):
    """It takes a Captum object first and gives a Captum result."""
    assert isinstance(cage, Attribution)
    result = cage.attribute(inp, TARGET)
    assert isinstance(result, LLMAttributionResult)
    with pytest.raises(NotImplementedError, match="GraphContextAttribution"):
        cage.attribute_future()


@pytest.mark.parametrize("normalization", ["positive", "absolute"])
@pytest.mark.parametrize("units", ["token", "word", "sentence"])
def test_mass_is_conserved(model, tokenizer, inp, normalization, units):
    """What is explained ends in the sources, or leaks."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    cage = GraphContextAttribution(llm_attr, normalization=normalization)
    result = cage.attribute(inp, TARGET, explain="answer", units=units)
    mass = float(result.seq_attr.sum()) + result.leaked
    assert mass == pytest.approx(len(result.explained), abs=1e-12)


@pytest.mark.parametrize(
    "target",
    [
        TARGET,
        tiny_tokenizer().encode(TARGET),
        tuple(tiny_tokenizer().encode(TARGET)),
        torch.tensor(tiny_tokenizer().encode(TARGET)),
        torch.tensor([tiny_tokenizer().encode(TARGET)]),
        np.array(tiny_tokenizer().encode(TARGET)),
    ],
    ids=["text", "list", "tuple", "tensor", "batch of one", "array"],
)
def test_a_target_is_text_or_ids(cage, inp, target):
    """All forms of the same target are the same target."""
    result = cage.attribute(inp, target, units="sentence")
    assert result.generated_text == TARGET
    assert result.output_tokens == ["Mia has 3 + 4 = 7 pens.", "The answer is 7."]


def test_without_a_target_the_model_writes_once_and_its_ids_are_used(
    model, tokenizer, inp, monkeypatch
):
    """Random ids are seldom what a tokenizer makes of their text."""
    calls = []
    generate = type(model).generate

    def counted(self, *args, **kwargs):
        calls.append(generate(self, *args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(type(model), "generate", counted)
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    arguments = {"max_new_tokens": 6, "do_sample": False}
    result = cage.attribute(inp, gen_args=arguments)
    assert len(calls) == 1
    generated = calls[0][0, inp.inp_tensor.shape[1] :].tolist()
    again = cage.attribute(inp, generated)
    assert (result.graph.rows == again.graph.rows).all()
    assert result.graph.n_generated == 6


def test_without_gen_args_captum_s_defaults_hold(cage, inp):
    """Greedy, 25 tokens."""
    assert cage.attribute(inp).graph.n_generated == 25


def test_the_end_token_is_a_unit_of_its_own(cage, inp, tokenizer):
    """A generated end of sequence has a row, and no sentence swallows it."""
    target = [*tokenizer.encode(TARGET), tokenizer.eos_token_id]
    result = cage.attribute(inp, target, units="sentence")
    assert result.output_tokens[-1] == "<eos>"
    assert result.units[-1].special


def test_each_side_can_have_its_own_units(cage, inp):
    """Sentences of the prompt, tokens of the answer."""
    units = {"source": "sentence", "generated": "token"}
    result = cage.attribute(inp, TARGET, units=units)
    assert result.input_tokens == ["Ana has 3 pens.", "Mia has 4 more pens than Ana."]
    assert "".join(result.output_tokens) == TARGET


def test_ranges_of_the_whole_text_are_units(cage, inp):
    """They count in the prompt followed by the generated text."""
    text = PROMPT + TARGET
    spans = [re.search(word, text).span() for word in ("Ana has", "answer is 7")]
    result = cage.attribute(inp, TARGET, units=spans)
    assert result.input_tokens[0] == "Ana has"
    assert "answer is 7" in result.output_tokens
    with pytest.raises(ValueError, match="must not reach across the end of the prompt"):
        cage.attribute(inp, TARGET, units=[(len(PROMPT) - 3, len(PROMPT) + 4)])


def test_a_template_s_segments_are_units_as_they_are(cage):
    """Whatever the units of the generated text."""
    inp = TextTemplateInput("{} has 3 {}.", ["Ana", "red pens"])
    result = cage.attribute(inp, TARGET, units="sentence")
    assert result.input_tokens == ["Ana", "red pens"]
    assert result.source_text == "Ana has 3 red pens."
    with pytest.raises(
        ValueError, match="features of this TextTemplateInput are larger"
    ):
        cage.attribute(inp, TARGET, units=[(0, 3)])


def test_masked_segments_of_a_template_are_one_unit(cage):
    """Labelled by all their values."""
    inp = TextTemplateInput("{} {} {}.", ["Ana", "has", "pens"], mask=[0, 1, 0])
    result = cage.attribute(inp, TARGET, units="sentence")
    assert sorted(result.input_tokens) == ["Ana … pens", "has"]


def test_probabilities_of_the_output_are_filled_in(cage, inp, model, tokenizer):
    """Captum leaves them empty."""
    ids = tokenizer.encode(PROMPT) + tokenizer.encode(TARGET)
    with torch.no_grad():
        probs = torch.softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    start = len(tokenizer.encode(PROMPT))
    expected = [float(probs[i - 1, ids[i]]) for i in range(start, len(ids))]
    found = cage.attribute(inp, TARGET).output_probs
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    coarse = cage.attribute(inp, TARGET, units={"generated": lambda t: [(0, len(t))]})
    assert coarse.output_probs.tolist() == pytest.approx([np.prod(expected)], rel=1e-3)


@pytest.mark.parametrize("baseline", ["auto", "<eos>", 1, 9])
def test_absent_generated_tokens_are_replaced_by_the_chosen_token(
    model, tokenizer, baseline, monkeypatch
):
    """Auto takes the baseline of the prompt."""
    seen = []
    forward = type(model).forward

    def record(self, *args, **inputs):
        seen.append(inputs["input_ids"][0].tolist())
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(model), "forward", record)
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    cage = GraphContextAttribution(llm_attr, generated_baseline=baseline)
    inp = TextTokenInput("Ana", tokenizer, baselines=5)
    cage.attribute(inp, tokenizer.encode(" has 3"), strategy="loop")
    expected = {"auto": 5, "<eos>": 1}.get(baseline, baseline)
    whole = tokenizer.encode("Ana has 3")
    assert [whole[0], expected, whole[2]] in seen
    assert [5, whole[1], whole[2]] in seen


def test_auto_takes_the_unknown_token_where_the_input_has_no_baseline(
    model, tokenizer, monkeypatch
):
    """Templates remove text; generated tokens become the unknown token."""
    seen = []
    forward = type(model).forward

    def record(self, *args, **inputs):
        seen.append(inputs["input_ids"][0].tolist())
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(model), "forward", record)
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    cage.attribute(
        TextTemplateInput("{} ", ["Ana"]), tokenizer.encode("has 3"), strategy="loop"
    )
    prompt = tokenizer.encode("Ana ")
    assert [*prompt, tokenizer.unk_token_id, *tokenizer.encode("has 3")[1:]] in seen


METHODS = {
    FeatureAblation: {},
    Lime: {"n_samples": 4},
    KernelShap: {"n_samples": 4},
    ShapleyValueSampling: {"n_samples": 1},
    ShapleyValues: {},
    LayerIntegratedGradients: {"n_steps": 2},
    LayerGradientXActivation: {},
    LayerGradientShap: {},
}
DRAWS_NOTHING = (FeatureAblation, LayerIntegratedGradients, LayerGradientXActivation)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:LayerGradientShap")
def test_model_tokenizer_and_captum_object_are_as_before(arch, method):
    """Parameters, mode, hooks, gradients, forward function, random state."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    model = tiny_model(arch, vocab_size=len(tokenizer))
    model.train()
    model.get_input_embeddings().eval()  # a mode of its own
    if method in (*list(METHODS)[5:],):
        wrapped = method(model, model.get_input_embeddings())
        llm_attr = LLMGradientAttribution(wrapped, tokenizer)
    else:
        llm_attr = LLMAttribution(method(model), tokenizer)

    def state():
        return {
            "parameters": {k: v.clone() for k, v in model.state_dict().items()},
            "gradients": [p.grad for p in model.parameters()],
            "requires": [p.requires_grad for p in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "hooks": [
                (dict(m._forward_hooks), dict(m._forward_pre_hooks))
                for m in model.modules()
            ],
            "forward": model.forward,
            "object": dict(vars(llm_attr).items()),
            "method": dict(vars(llm_attr.attr_method).items()),
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "special": tokenizer.all_special_ids,
            "config": model.config.to_dict(),
            "drawn": torch.get_rng_state() if method in DRAWS_NOTHING else None,
            "numpy": str(np.random.get_state())  # noqa: NPY002
            if method in DRAWS_NOTHING
            else None,
        }

    before = state()
    inp = TextTokenInput("Ana has", tokenizer)
    GraphContextAttribution(llm_attr).attribute(inp, " 3 pens.", **METHODS[method])
    after = state()
    for name, value in before.items():
        if name == "parameters":
            assert all(torch.equal(value[k], after[name][k]) for k in value)
        elif name == "drawn" and value is not None:
            assert torch.equal(value, after[name])
        elif name != "drawn":
            assert value == after[name], name


def test_dropout_does_not_reach_the_rows(tokenizer, inp):
    """A model left in training mode is explained in evaluation mode."""
    model = tiny_model("gpt2", vocab_size=len(tokenizer), resid_pdrop=0.5)
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    quiet = cage.attribute(inp, TARGET).graph.rows
    model.train()
    assert (cage.attribute(inp, TARGET).graph.rows == quiet).all()
    assert model.training


def test_the_model_is_restored_after_an_error(tokenizer, inp):
    """Also when the base method fails."""

    class Failing(FeatureAblation):
        def attribute(self, *_args, **_kwargs):
            raise RuntimeError("no luck")

    model = tiny_model(vocab_size=len(tokenizer)).train()
    cage = GraphContextAttribution(LLMAttribution(Failing(model), tokenizer))
    with pytest.raises(RuntimeError, match="no luck"):
        cage.attribute(inp, TARGET)
    assert all(module.training for module in model.modules())


@pytest.fixture
def interrupted():
    """A class of its own for each test, as it counts its calls."""

    class Interrupted(FeatureAblation):
        """Ablation that is interrupted in its fourth call."""

        calls, stop = 0, 4

        def attribute(self, *args, **kwargs):
            type(self).calls += 1
            if type(self).calls == type(self).stop:
                raise KeyboardInterrupt
            return super().attribute(*args, **kwargs)

    return Interrupted


def test_an_interrupted_call_goes_on_where_it_stopped(
    interrupted, fresh_model, tokenizer, inp, caplog
):
    """Finished rows are not asked for again, and the result is the same."""
    llm_attr = LLMAttribution(interrupted(fresh_model), tokenizer)
    cage = GraphContextAttribution(llm_attr)
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        cage.attribute(inp, TARGET, strategy="loop")
    assert "stopped after 3 of" in caplog.text
    result = cage.attribute(inp, TARGET, strategy="loop")
    assert interrupted.calls == result.graph.n_generated + 1
    whole = GraphContextAttribution(
        LLMAttribution(FeatureAblation(fresh_model), tokenizer)
    ).attribute(inp, TARGET, strategy="loop")
    assert (result.graph.rows == whole.graph.rows).all()


@pytest.mark.parametrize("change", ["target", "units", "weights", "input"])
def test_rows_of_an_interrupted_call_serve_that_call_alone(
    interrupted, fresh_model, tokenizer, inp, change
):
    """Another question, or a changed model, starts afresh."""
    llm_attr = LLMAttribution(interrupted(fresh_model), tokenizer)
    cage = GraphContextAttribution(llm_attr)
    with pytest.raises(KeyboardInterrupt):
        cage.attribute(inp, TARGET)
    target, units = TARGET, "token"
    if change == "target":
        target = TARGET.replace("7", "9")
    elif change == "units":
        units = "word"
    elif change == "weights":
        with torch.no_grad():
            next(fresh_model.parameters()).mul_(1.1)
    else:
        inp = TextTokenInput(PROMPT, tokenizer)
    result = cage.attribute(inp, target, units=units)
    assert interrupted.calls == result.graph.n_generated + 4


def test_two_threads_with_one_model_do_not_mix(model, tokenizer, inp):
    """Gradient methods hook the model's layer: the second waits."""
    method = LayerGradientXActivation(model, model.get_input_embeddings())
    cage = GraphContextAttribution(LLMGradientAttribution(method, tokenizer))
    expected = cage.attribute(inp, TARGET).graph.rows
    found = []

    def explain():
        found.append(cage.attribute(inp, TARGET).graph.rows)

    threads = [threading.Thread(target=explain) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all((rows == expected).all() for rows in found)


def test_progress_is_shown_on_request_only(cage, inp, capsys):
    """On stderr, a row at a time."""
    cage.attribute(inp, TARGET, units="sentence", strategy="loop")
    assert capsys.readouterr().err == ""
    cage.attribute(inp, TARGET, units="sentence", show_progress=True, strategy="loop")
    captured = capsys.readouterr()
    assert "2/2" in captured.err
    assert captured.out == ""


# --- bad input: a clear error before any model call --------------------------------


@pytest.fixture
def untouched(model, monkeypatch):
    """The model, which must not be called."""

    def called(*_args, **_kwargs):
        raise AssertionError("the model was called")

    monkeypatch.setattr(type(model), "forward", called)
    return model


@pytest.fixture
def idle(untouched, tokenizer):
    """Ablation of a model that must not be called."""
    return GraphContextAttribution(
        LLMAttribution(FeatureAblation(untouched), tokenizer)
    )


@pytest.mark.parametrize("target", ["", [], torch.tensor([], dtype=torch.long)])
def test_an_empty_target_is_refused(idle, inp, target):
    """There is nothing to explain."""
    with pytest.raises(ValueError, match="target: must have a token, but it is empty"):
        idle.attribute(inp, target)


@pytest.mark.parametrize("make", [TextTokenInput, None])
def test_an_empty_prompt_is_refused(idle, tokenizer, make):
    """There is nothing to attribute to."""
    empty = TextTemplateInput("{}", [""]) if make is None else make("", tokenizer)
    with pytest.raises((ValueError, TypeError), match=r"inp: .*empty"):
        idle.attribute(empty, TARGET)


def test_a_prompt_with_every_token_skipped_is_refused(idle, tokenizer):
    """There is nothing to attribute to."""
    ids = tokenizer.encode(PROMPT)
    inp = TextTokenInput(PROMPT, tokenizer, skip_tokens=ids)
    with pytest.raises(ValueError, match="inp: must have a feature to attribute to"):
        idle.attribute(inp, TARGET)


@pytest.mark.parametrize(
    ("explain", "message"),
    [
        ("eighteen", "does not occur in the generated text. It reads: ' Mia has 3"),
        (re.compile("[a-z]{20}"), "does not occur in the generated text"),
        (99, "explain: .*99"),
        ((4, 4), "must mean at least one generated unit"),
    ],
)
def test_a_span_that_is_not_there_is_refused(idle, inp, explain, message):
    """With what the text reads."""
    with pytest.raises(ValueError, match=message):
        idle.attribute(inp, TARGET, explain=explain)


def test_a_text_longer_than_the_model_s_context_is_refused(idle, tokenizer):
    """Prompt and target together count."""
    long = TokenIdsInput([5] * 257, tokenizer)
    with pytest.raises(ValueError, match="of 256 tokens, but the prompt has 257"):
        idle.attribute(long, TARGET)
    inp = TokenIdsInput([5] * 250, tokenizer)
    with pytest.raises(ValueError, match="the prompt has 250 and target 10"):
        idle.attribute(inp, [5] * 10)


def test_exact_shapley_values_on_many_units_are_refused(untouched, tokenizer, inp):
    """They would never end."""
    method = ShapleyValues(untouched)
    cage = GraphContextAttribution(LLMAttribution(method, tokenizer))
    with pytest.raises(ValueError, match=r"takes at most 7 .* has \d+ units"):
        cage.attribute(inp, TARGET)


@pytest.mark.parametrize("number", [374, -1, 10**6])
def test_ids_out_of_the_vocabulary_are_refused(idle, inp, number):
    """They would fail deep in the embedding, or not at all."""
    with pytest.raises(ValueError, match=f"target: .* {number} came"):
        idle.attribute(inp, [5, number])


def test_a_prompt_of_another_model_s_tokenizer_is_refused(idle):
    """Where its ids give it away."""
    other = TextTokenInput(PROMPT, tiny_tokenizer("sentencepiece"))
    other.inp_tensor = other.inp_tensor + 374
    with pytest.raises(ValueError, match="inp: its ids must be in the vocab"):
        idle.attribute(other, TARGET)


@pytest.mark.parametrize("inp", [PROMPT, None, 3, torch.tensor([[1, 2]])])
def test_an_input_that_is_not_captum_s_is_refused(idle, inp):
    """With the class to wrap it in."""
    with pytest.raises(TypeError, match=r"inp: must be one of Captum.*TextTok"):
        idle.attribute(inp, TARGET)


@pytest.mark.parametrize(("target", "came"), [(3, "int 3"), (object(), "object")])
def test_a_target_of_another_kind_is_refused(idle, inp, target, came):
    """It is text, ids or None."""
    with pytest.raises(TypeError, match=f"target: must be a text.*{came}"):
        idle.attribute(inp, target)


def test_ids_that_are_no_whole_numbers_are_refused(idle, inp):
    """Floats are no ids."""
    with pytest.raises(TypeError, match=r"target: must be token ids.*float 1\.5"):
        idle.attribute(inp, [1.5])
    with pytest.raises(ValueError, match="target: must be the ids of one sequence"):
        idle.attribute(inp, [[1], [2]])


def test_gen_args_go_with_generation_alone(idle, inp):
    """With a target nothing is generated."""
    with pytest.raises(ValueError, match="gen_args: must be None where target"):
        idle.attribute(inp, TARGET, gen_args={"max_new_tokens": 3})


@pytest.mark.parametrize(
    ("argument", "value"),
    [("normalization", "softmax"), ("normalization", None)],
)
def test_unknown_settings_are_refused(model, tokenizer, argument, value):
    """With the list of known ones."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    with pytest.raises(ValueError, match=f"{argument}: must be one of 'positive'"):
        GraphContextAttribution(llm_attr, **{argument: value})


def test_an_unknown_strategy_is_refused(idle, inp):
    """With the list of known ones."""
    with pytest.raises(ValueError, match="strategy: must be one of 'auto', 'loop'"):
        idle.attribute(inp, TARGET, strategy="magic")


@pytest.mark.parametrize("units", ["paragraph", {"prompt": "token"}, {}])
def test_unknown_units_are_refused(idle, inp, units):
    """With the known ones."""
    with pytest.raises(ValueError, match="units"):
        idle.attribute(inp, TARGET, units=units)


def test_an_unknown_baseline_token_is_refused(model, tokenizer, inp):
    """With the remedy."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    cage = GraphContextAttribution(llm_attr, generated_baseline="<nothing>")
    with pytest.raises(ValueError, match=r"generated_baseline: .*'<nothing>'"):
        cage.attribute(inp, TARGET)
    with pytest.raises(TypeError, match="generated_baseline: must be 'auto'"):
        GraphContextAttribution(llm_attr, generated_baseline=1.5)


def test_a_baseline_out_of_the_vocabulary_is_refused(untouched, tokenizer, inp):
    """It would fail deep in the embedding."""
    llm_attr = LLMAttribution(FeatureAblation(untouched), tokenizer)
    cage = GraphContextAttribution(llm_attr, generated_baseline=374)
    with pytest.raises(ValueError, match=r"generated_baseline: .* of 374.*id 374"):
        cage.attribute(inp, TARGET)


def test_an_encoder_decoder_is_refused(tokenizer):
    """Its prompt and answer are not one sequence."""
    config = T5Config(
        d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=9
    )
    model = T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="llm_attr: the model must be a decoder"):
        GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))


def test_a_model_without_a_chat_template_is_refused(tokenizer):
    """The remedy is plain text."""
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="tokenizer: must have a chat template"):
        ChatTokenInput([{"role": "user", "content": "Hi"}], bare)


def test_a_model_that_gives_nan_is_refused(fresh_model, tokenizer, inp):
    """It would make a graph of nothing."""
    with torch.no_grad():
        fresh_model.lm_head.weight[5] = float("nan")
    cage = GraphContextAttribution(
        LLMAttribution(FeatureAblation(fresh_model), tokenizer)
    )
    with pytest.raises(ValueError, match=r"model must give log-probabilities.*nan"):
        cage.attribute(inp, TARGET)
