"""Raw rows: the ids that the model sees, and the numbers, against Captum's own."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    LLMAttribution,
    LLMGradientAttribution,
    RemoteLLMAttribution,
    ShapleyValues,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)
from captum.attr._core.llm_attr import _PlaceholderModel

from captum_cage import ChatTokenInput, GraphContextAttribution, TokenIdsInput
from captum_cage.inputs import extended_model_input
from conftest import PROMPT, TARGET
from tiny import (
    ARCHITECTURES,
    LocalProvider,
    image_input,
    inputs_of_each_kind,
    tiny_model,
    tiny_tokenizer,
)

PERTURBATION = {
    FeatureAblation: {},
    ShapleyValueSampling: {"n_samples": 1},
    Lime: {"n_samples": 8},
    KernelShap: {"n_samples": 8},
}
GRADIENT = {
    LayerIntegratedGradients: {"n_steps": 2},
    LayerGradientXActivation: {},
    LayerGradientShap: {"n_samples": 2},
}


def wrapped(method, model, tokenizer, **changes):
    """The method in Captum's wrapper, in ours."""
    if method in GRADIENT:
        layer = model.get_input_embeddings()
        llm_attr = LLMGradientAttribution(method(model, layer), tokenizer)
    else:
        llm_attr = LLMAttribution(method(model), tokenizer, **changes)
    return GraphContextAttribution(llm_attr)


@pytest.fixture
def recorded(model, monkeypatch):
    """Ids of every forward pass of the model."""
    seen = []
    forward = type(model).forward

    def record(self, *args, **inputs):
        ids = inputs["input_ids"] if "input_ids" in inputs else args[0]
        seen.extend(ids.tolist())
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(model), "forward", record)
    return seen


KINDS = list(inputs_of_each_kind(tiny_tokenizer(), PROMPT))


@pytest.mark.parametrize(
    ("kind", "units"),
    [
        *((kind, "token") for kind in KINDS),
        *((kind, "sentence") for kind in ("tokens", "chat", "template, list")),
    ],
)
def test_each_row_is_of_exactly_the_prompt_s_and_generated_ids(
    model, tokenizer, recorded, kind, units
):
    """Ids go in; nothing that was generated is tokenised again."""
    inp = inputs_of_each_kind(tokenizer, PROMPT)[kind]
    # These ids are not what a tokenizer makes of their text.
    target = [n for text in ("7 p", "en", "s. É😀") for n in tokenizer.encode(text)]
    assert tokenizer.encode(tokenizer.decode(target)) != target
    given = inp.to_model_input()
    prompt = tokenizer.encode(given) if isinstance(given, str) else given[0].tolist()

    cage = wrapped(FeatureAblation, model, tokenizer)
    result = cage.attribute(inp, target, units=units, strategy="loop")

    whole = prompt + target
    ends = range(1, len(target) + 1)
    if units == "sentence":
        # The space goes with the sentence before it.
        ends = [target.index(tokenizer.encode(".")[0]) + 2, len(target)]
    unperturbed = {len(ids) for ids in recorded if ids == whole[: len(ids)]}
    assert unperturbed == {len(prompt) + end for end in ends}
    assert result.graph.n_generated == len(ends)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "template" not in kind])
def test_perturbed_ids_differ_in_one_unit_alone(model, tokenizer, recorded, kind):
    """A row's perturbations replace the tokens of one unit by the baseline."""
    inp = inputs_of_each_kind(tokenizer, PROMPT)[kind]
    target = tokenizer.encode(TARGET)
    prompt = inp.to_model_input()[0].tolist()
    whole = prompt + target
    cage = wrapped(FeatureAblation, model, tokenizer)
    result = cage.attribute(inp, target, units="sentence", strategy="loop")
    changed = set()
    for ids in recorded:
        assert len(ids) <= len(whole)
        places = tuple(i for i, number in enumerate(ids) if number != whole[i])
        assert all(ids[i] == 0 for i in places)
        if places:
            changed.add(places)
    expected = set(_units_by_hand(inp, tokenizer, target)[:-1])
    assert changed == expected
    assert result.graph.n_units == len(expected) + 1


def _units_by_hand(inp, tokenizer, target):
    """Tokens of each unit of the inputs above: sentences, or groups as given."""
    start = len(inp.to_model_input()[0])
    ids = inp.to_model_input()[0].tolist()
    end, ask = tokenizer.encode(".")[0], tokenizer.encode("?")[0]
    units = []
    if isinstance(inp, TokenIdsInput) and inp.feature_of_token.max() + 1 != sum(
        inp.feature_of_token >= 0
    ):
        units = [
            tuple(np.flatnonzero(inp.feature_of_token == feature).tolist())
            for feature in range(inp.n_itp_features)
        ]
    else:
        mask = inp.itp_mask
        chosen = np.ones(start, bool) if mask is None else mask[0].numpy()
        unit = []
        for i in range(start):
            if chosen[i] and not (isinstance(inp, ChatTokenInput) and ids[i] < 7):
                unit.append(i)
            goes_on = i + 1 < start and tokenizer.decode(ids[i + 1]).isspace()
            full = ids[i] in (end, ask) or tokenizer.decode(ids[i]).isspace()
            if (full and not goes_on) or i == start - 1:
                units += [tuple(unit)] if unit else []
                unit = []
    unit = []
    for i, number in enumerate(target):
        unit.append(start + i)
        if number == end:
            units.append(tuple(unit))
            unit = []
    return units


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("method", [*PERTURBATION, *GRADIENT])
@pytest.mark.filterwarnings("ignore:LayerGradientShap")
def test_every_method_gives_causal_rows_on_every_architecture(arch, method):
    """Zero from a unit's own place on, and something before it."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(arch, vocab_size=len(tokenizer))
    kwargs = {**PERTURBATION, **GRADIENT}[method]
    cage = wrapped(method, model, tokenizer)
    target = tokenizer.encode(TARGET)[:5]
    rows = cage.attribute(
        TextTokenInput("Ana has", tokenizer), target, **kwargs, strategy="loop"
    ).graph.rows
    for t in range(len(target)):
        assert (rows[t, 2 + t :] == 0).all()
        assert np.isfinite(rows[t]).all()
    if method is not Lime:  # whose fit may be empty
        assert (np.abs(rows).sum(axis=1) > 0).all()


def test_exact_shapley_values_are_efficient(model, tokenizer):
    """A row sums to the drop from all present to all absent, units of any size."""
    cage = wrapped(ShapleyValues, model, tokenizer)
    inp = TextTokenInput("Ana has", tokenizer)
    target = tokenizer.encode(" 3 pens")
    rows = cage.attribute(inp, target, strategy="loop").graph.rows
    for t, number in enumerate(target):
        scores = []
        for ids in (inp.inp_tensor[0].tolist() + target[:t], [0] * (2 + t)):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            scores.append(float(torch.log_softmax(logits, -1)[number]))
        assert rows[t].sum() == pytest.approx(scores[0] - scores[1], abs=1e-5)


@pytest.mark.parametrize("attr_target", ["log_prob", "prob"])
def test_ablation_s_prompt_columns_are_captum_s_own(model, tokenizer, attr_target):
    """Equal to the last bit, uncached, token by token."""
    inp = TextTokenInput(PROMPT, tokenizer, skip_tokens=tokenizer.encode("."))
    target = torch.tensor(tokenizer.encode(TARGET))
    llm_attr = LLMAttribution(
        FeatureAblation(model), tokenizer, attr_target=attr_target
    )
    theirs = llm_attr.attribute(inp, target, use_cached_outputs=False).token_attr
    cage = GraphContextAttribution(llm_attr)
    ours = cage.attribute(
        inp, target, forward_in_tokens=True, strategy="loop"
    ).graph.rows
    assert (ours[:, : inp.n_itp_features] == theirs.double().numpy()).all()


def test_gradient_x_activation_s_prompt_columns_are_captum_s_own(model, tokenizer):
    """Equal to the last bit."""
    inp = TextTokenInput(PROMPT, tokenizer, skip_tokens=tokenizer.encode("."))
    target = torch.tensor(tokenizer.encode(TARGET))
    method = LayerGradientXActivation(model, model.get_input_embeddings())
    llm_attr = LLMGradientAttribution(method, tokenizer)
    theirs = llm_attr.attribute(inp, target).token_attr
    ours = (
        GraphContextAttribution(llm_attr)
        .attribute(inp, target, strategy="loop")
        .graph.rows
    )
    assert (ours[:, : inp.n_itp_features] == theirs.double().numpy()).all()


def test_integrated_gradients_first_row_is_captum_s_own(model, tokenizer):
    """Later rows differ by design: the prefix joins the path."""
    inp = TextTokenInput(PROMPT, tokenizer)
    target = torch.tensor(tokenizer.encode(TARGET)[:3])
    method = LayerIntegratedGradients(model, model.get_input_embeddings())
    llm_attr = LLMGradientAttribution(method, tokenizer)
    theirs = llm_attr.attribute(inp, target, n_steps=4).token_attr
    ours = (
        GraphContextAttribution(llm_attr)
        .attribute(inp, target, n_steps=4, strategy="loop")
        .graph.rows
    )
    assert (ours[0, : inp.n_itp_features] == theirs[0].double().numpy()).all()


def test_integrated_gradients_are_complete_with_the_prefix_on_the_path(tokenizer):
    """A row sums to the log-probability's drop to the baseline, prefix included."""
    model = tiny_model(vocab_size=len(tokenizer), dtype=torch.float64)
    inp = TextTokenInput("Ana has 3", tokenizer)
    target = tokenizer.encode(" pens. The")
    method = LayerIntegratedGradients(model, model.get_input_embeddings())
    cage = GraphContextAttribution(LLMGradientAttribution(method, tokenizer))
    rows = cage.attribute(inp, target, n_steps=200, strategy="loop").graph.rows
    for t, number in enumerate(target):
        scores = []
        present = inp.inp_tensor[0].tolist() + target[:t]
        for ids in (present, [0] * len(present)):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            scores.append(float(torch.log_softmax(logits, -1)[number]))
        assert rows[t].sum() == pytest.approx(scores[0] - scores[1], abs=1e-3)


def test_a_coarse_perturbation_row_is_captum_s_sequence_attribution(model, tokenizer):
    """A unit is perturbed as a whole, and not multiplied by its number of tokens."""
    target = tokenizer.encode(TARGET)
    cage = wrapped(FeatureAblation, model, tokenizer)
    inp = TextTokenInput(PROMPT, tokenizer)
    rows = cage.attribute(inp, target, units="sentence", strategy="loop").graph.rows
    prompt = inp.inp_tensor[0].tolist()
    cut = target.index(tokenizer.encode(".")[0]) + 1

    def score(ids, start):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        scores = torch.log_softmax(logits.double(), -1)
        return sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids)))

    first_sentence = prompt.index(tokenizer.encode(".")[0]) + 1
    blocks = [
        range(first_sentence),
        range(first_sentence, len(prompt)),
        range(len(prompt), len(prompt) + cut),
    ]
    whole = prompt + target
    start = len(prompt) + cut
    for j, block in enumerate(blocks):
        changed = [0 if i in block else number for i, number in enumerate(whole)]
        assert rows[1, j] == pytest.approx(
            score(whole, start) - score(changed, start), abs=1e-4
        )
    assert rows[1, 3] == 0


def test_a_coarse_gradient_row_sums_rows_and_columns_and_drops_its_block(
    model, tokenizer
):
    """Group first: the raw scores are summed, and nothing within the unit counts."""
    inp = TextTokenInput(PROMPT, tokenizer)
    target = tokenizer.encode(TARGET)
    cage = wrapped(LayerGradientXActivation, model, tokenizer)
    fine = cage.attribute(inp, target, strategy="loop")
    coarse = cage.attribute(inp, target, units="sentence", strategy="loop")
    groups = []
    for unit in fine.units:
        side = [u for u in coarse.units if u.generated == unit.generated]
        inside = [
            i for i, u in enumerate(side) if u.span[0] <= unit.span[1] - 1 < u.span[1]
        ]
        groups.append(inside[0] + (coarse.graph.n_sources if unit.generated else 0))
    expected = np.zeros(coarse.graph.rows.shape)
    P = fine.graph.n_sources
    for t in range(fine.graph.n_generated):
        for j in range(P + t):
            if groups[j] != groups[P + t]:
                row = groups[P + t] - coarse.graph.n_sources
                expected[row, groups[j]] += fine.graph.rows[t, j]
    assert coarse.graph.rows == pytest.approx(expected, abs=1e-6)
    assert coarse.graph.matrix.toarray() == pytest.approx(
        fine.graph.coarsen(groups).matrix.toarray(), abs=1e-6
    )


def test_a_remote_model_gives_the_rows_of_the_local_one(model, tokenizer):
    """Where text survives tokenisation, the same numbers come back over the wire."""
    provider = LocalProvider(model, tokenizer)
    method = FeatureAblation(_PlaceholderModel())
    remote = RemoteLLMAttribution(method, tokenizer, provider)
    local = LLMAttribution(FeatureAblation(model), tokenizer)
    inp = TextTokenInput(PROMPT, tokenizer)
    found = [
        GraphContextAttribution(llm_attr).attribute(
            inp, TARGET, units="sentence", strategy="loop"
        )
        for llm_attr in (remote, local)
    ]
    # The blank token has text for the server: "<unk>" is read back as one id.
    assert found[0].graph.rows == pytest.approx(found[1].graph.rows, abs=1e-5)
    assert found[0].output_probs.tolist() == pytest.approx(
        found[1].output_probs.tolist(), rel=1e-4
    )


@pytest.mark.parametrize("method", [ShapleyValueSampling, Lime, KernelShap])
def test_remote_models_work_with_every_perturbation_method(model, tokenizer, method):
    """The provider is asked for every row."""
    provider = LocalProvider(model, tokenizer)
    llm_attr = RemoteLLMAttribution(method(_PlaceholderModel()), tokenizer, provider)
    inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
    kwargs = {"n_samples": 4}
    cage = GraphContextAttribution(llm_attr)
    result = cage.attribute(
        inp, " Mia has 3. So?", units="word", **kwargs, strategy="loop"
    )
    assert result.graph.rows.shape == (4, 6)


def test_a_remote_model_writes_once_and_is_read_as_it_wrote(model, tokenizer):
    """Without a target the provider generates."""
    provider = LocalProvider(model, tokenizer)
    method = FeatureAblation(_PlaceholderModel())
    llm_attr = RemoteLLMAttribution(method, tokenizer, provider)
    inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
    expected = provider.generate(inp.to_model_input(), max_new_tokens=3)
    cage = GraphContextAttribution(llm_attr)
    whole = {"source": "token", "generated": lambda text: [(0, len(text))]}
    result = cage.attribute(
        inp, units=whole, gen_args={"max_new_tokens": 3}, strategy="loop"
    )
    assert result.generated_text == expected


def test_the_server_s_bos_is_not_doubled(model):
    """Decoded into the prompt's text, ``<s>`` would be put there twice."""
    tokenizer = tiny_tokenizer("sentencepiece")
    model = tiny_model(vocab_size=len(tokenizer))
    provider = LocalProvider(model, tokenizer)
    method = FeatureAblation(_PlaceholderModel())
    llm_attr = RemoteLLMAttribution(method, tokenizer, provider)
    inp = TextTokenInput("Ana has 3 pens.", tokenizer, skip_tokens=[1])
    assert inp.inp_tensor[0, 0] == tokenizer.bos_token_id
    target = tokenizer.encode("Ana has", add_special_tokens=False)
    with pytest.warns(UserWarning, match="reads the text of"):
        GraphContextAttribution(llm_attr).attribute(
            inp, target, units="sentence", strategy="loop"
        )


def test_a_remote_unit_that_is_a_piece_of_a_character_is_refused(model, tokenizer):
    """Before any request, with the remedy."""
    provider = LocalProvider(model, tokenizer)
    method = FeatureAblation(_PlaceholderModel())
    cage = GraphContextAttribution(RemoteLLMAttribution(method, tokenizer, provider))
    inp = TextTokenInput(PROMPT, tokenizer)
    with pytest.raises(
        ValueError, match=r"units: a remote model scores text.*larger units"
    ):
        cage.attribute(inp, "😀", strategy="loop")
    assert provider.prompts == []
    assert (
        cage.attribute(inp, "😀", units="word", strategy="loop").graph.n_generated == 1
    )


def test_gradient_methods_refuse_inputs_without_tokens(model, tokenizer):
    """A template's segments have no gradient."""
    cage = wrapped(LayerGradientXActivation, model, tokenizer)
    inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
    with pytest.raises(
        TypeError, match=r"inp: LayerGradientXActivation attributes to tok"
    ):
        cage.attribute(inp, TARGET, strategy="loop")


def test_gradient_methods_take_features_of_several_tokens(model, tokenizer):
    """A feature's score is the sum of its tokens' scores."""
    ids = tokenizer.encode(PROMPT)
    groups = [i // 3 - 1 for i in range(len(ids))]
    cage = wrapped(LayerGradientXActivation, model, tokenizer)
    coarse = cage.attribute(
        TokenIdsInput(ids, tokenizer, feature_mask=groups), TARGET, strategy="loop"
    )
    fine = cage.attribute(TokenIdsInput(ids, tokenizer), TARGET, strategy="loop")
    for group in range(max(groups) + 1):
        tokens = [i for i, g in enumerate(groups) if g == group]
        assert coarse.graph.rows[:, group] == pytest.approx(
            fine.graph.rows[:, tokens].sum(axis=1), abs=1e-6
        )


def test_nan_is_named_by_unit(model, tokenizer):
    """A base method's NaN never reaches the graph."""

    class Broken(FeatureAblation):
        def attribute(self, *args, **kwargs):
            return super().attribute(*args, **kwargs) * float("nan")

    cage = wrapped(Broken, model, tokenizer)
    with pytest.raises(ValueError, match=r"Broken: must give.*nan came for unit 0"):
        cage.attribute(TextTokenInput(PROMPT, tokenizer), TARGET, strategy="loop")


@pytest.mark.parametrize("units", ["token", "sentence"])
def test_image_rows_are_the_differences_of_plain_forwards(
    vision_model, tokenizer, units
):
    """Defect 2: Captum's defaults give zeros. Generated tokens are units as ever."""
    target = tokenizer.encode(" 3 pens. So 4.")
    inp = image_input(tokenizer)
    cage = wrapped(FeatureAblation, vision_model, tokenizer)
    result = cage.attribute(inp, target, units=units, strategy="loop")

    def scores(present, absent_tokens):
        inputs = inp.to_model_input(torch.tensor([present]))
        prompt = inputs["input_ids"][0].tolist()
        tail = [0 if i in absent_tokens else n for i, n in enumerate(target)]
        ids = torch.tensor([prompt + tail])
        with torch.no_grad():
            logits = vision_model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=inputs["pixel_values"],
            ).logits[0]
        logs = torch.log_softmax(logits.double(), -1)
        return [
            float(logs[len(prompt) + t - 1, number]) for t, number in enumerate(target)
        ]

    blocks = [[t] for t in range(len(target))]
    if units == "sentence":
        cut = target.index(tokenizer.encode(".")[0]) + 1
        blocks = [list(range(cut)), list(range(cut, len(target)))]
    base = scores([1.0, 1.0], [])
    for row, block in enumerate(blocks):
        cases = [([0.0, 1.0], []), ([1.0, 0.0], [])]
        cases += [([1.0, 1.0], before) for before in blocks[:row]]
        for column, case in enumerate(cases):
            drop = sum(base[t] - scores(*case)[t] for t in block)
            assert result.graph.rows[row, column] == pytest.approx(drop, abs=1e-4)
    assert np.abs(result.graph.rows[:, :2]).min() > 0
    assert result.input_tokens == ["image_feature_0", "image_feature_1"]
    figure, _ = result.plot_image_heatmap()
    plt.close(figure)


def test_a_model_input_with_unknown_numbers_per_token_is_refused(
    vision_model, tokenizer
):
    """What a generated token would get there is not known."""
    cage = wrapped(FeatureAblation, vision_model, tokenizer)
    inp = image_input(tokenizer, my_token_weights=torch.ones_like)
    with pytest.raises(ValueError, match="'my_token_weights': must not have one num"):
        cage.attribute(inp, " 3 pens.", strategy="loop")


def test_known_numbers_per_token_grow_with_the_ids(tokenizer):
    """Token types of generated text are those of text."""
    inputs = image_input(tokenizer, mm_token_type_ids=torch.ones_like).to_model_input()
    extended = extended_model_input(inputs, torch.tensor([[5, 6]]))
    assert extended["mm_token_type_ids"][0].tolist()[-3:] == [1, 0, 0]
    assert extended["attention_mask"][0].tolist()[-2:] == [1, 1]
    assert extended["input_ids"][0].tolist()[-2:] == [5, 6]
    assert inputs["input_ids"].shape[1] + 2 == extended["input_ids"].shape[1]


def test_probabilities_of_larger_units_need_inputs_of_ids_alone(
    vision_model, tokenizer
):
    """They do not add up over tokens that are scored one by one."""
    cage = wrapped(FeatureAblation, vision_model, tokenizer, attr_target="prob")
    with pytest.raises(ValueError, match="'prob' and the input is more than ids"):
        cage.attribute(
            image_input(tokenizer), TARGET, units="sentence", strategy="loop"
        )
