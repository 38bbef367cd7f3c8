"""The catalogue, and that every base method keeps what it declares."""

from __future__ import annotations

import copy
import inspect
import re

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerActivation,
    LayerGradientShap,
    LayerGradientXActivation,
    LLMAttribution,
    LLMGradientAttribution,
    RemoteLLMAttribution,
)
from transformers import BertConfig, BertForMaskedLM

from captum_cage import GraphContextAttribution
from captum_cage.methods import Capability, TokenMethod, UnitMethod, catalogue
from captum_cage.methods.catalogue import (
    accepted_inputs,
    capabilities,
    capability_of,
    llm_attribution,
    markdown_table,
    method_named,
    missing_extra,
    needs_argument,
    unsupported_table,
)
from tiny import (
    ARCHITECTURES,
    UNITS_AND_ARCHITECTURES,
    LocalProvider,
    image_input,
    inputs_of_each_kind,
    tiny_model,
    tiny_tokenizer,
)

PROMPT = "Ana has 3. Mia has"
SHORT = "Ana has 3. Mia"
TARGET = " 4. So"
LONG = "Ana has 3 pens. Mia has 4 more pens than Ana."
KNOWN = {declared.name: (method, declared) for method, declared in capabilities()}
KINDS = list(inputs_of_each_kind(tiny_tokenizer(), PROMPT))
TAKEN = {
    name: [
        kind
        for kind in KINDS
        if not kind.startswith("template") or "templates" in accepted_inputs(declared)
    ]
    for name, (_, declared) in KNOWN.items()
}


def cases():
    """Every method with every input, and with all units and architectures.

    A third of the inputs with each but the first of these, so that some methods have
    what others have not.
    """
    for number, (name, taken) in enumerate(TAKEN.items()):
        for place, (units, arch) in enumerate(UNITS_AND_ARCHITECTURES):
            some = taken if place == 0 else taken[(number + place) % 3 :: 3]
            yield pytest.param(name, units, arch, some, id=f"{name}-{units}-{arch}")


every_method = pytest.mark.parametrize("name", KNOWN)


@pytest.fixture(scope="module")
def models(tokenizer):
    """A small model of each architecture."""
    return {arch: tiny_model(arch, vocab_size=len(tokenizer)) for arch in ARCHITECTURES}


@pytest.fixture(scope="module")
def masked():
    """A small masked language model and its tokenizer, as options."""
    kind = copy.deepcopy(tiny_tokenizer("wordpiece"))
    kind.add_special_tokens({"mask_token": "[MASK]"})
    state = torch.get_rng_state()
    config = BertConfig(
        vocab_size=len(kind),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = BertForMaskedLM(config).eval()
    torch.set_rng_state(state)
    return {"masked_lm": model, "masked_tokenizer": kind}


@pytest.fixture
def made(tokenizer, masked):
    """A function that wraps a method, with all that it needs."""

    def make(name, model, **more):
        method, declared = KNOWN[name]
        if missing_extra(declared):
            pytest.skip(f"{declared.extra} is not installed")
        for option, value in masked.items():
            if needs_argument(method, option) is not None:
                more.setdefault(option, value)
        if declared.counted and needs_argument(method, declared.counted) is not None:
            more.setdefault(declared.counted, 6)
        return llm_attribution(name, model, tokenizer, **more)

    return make


def bare(llm_attr):
    """The method of a Captum object, as it was before it was wrapped."""
    method = copy.copy(llm_attr.attr_method)
    method.forward_func = llm_attr.model
    return method


def few(name):
    """Arguments of ``attribute`` that keep the number of evaluations small."""
    method, declared = KNOWN[name]
    if declared.counted in inspect.signature(method.attribute).parameters:
        return {declared.counted: 6}
    return {}


def explained(llm_attr, inp, target=TARGET, seed=0, **arguments):
    """The last generated unit, explained; the methods draw from fixed seeds."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    cage = GraphContextAttribution(llm_attr)
    return cage.attribute(inp, target, explain=-1, **arguments)


def assert_sound(result):
    """Rows are finite and causal, and no mass is lost."""
    rows, sources = result.graph.rows, result.graph.n_sources
    steps = result.graph.n_generated
    assert steps >= 1
    assert rows.shape == (steps, sources + steps)
    assert np.isfinite(rows).all()
    assert (np.triu(rows[:, sources:]) == 0).all()
    # A sparse regression may find nothing.
    assert np.abs(rows).max() > 0 or result.meta["method"] == "Lime"
    assert float(result.seq_attr.sum()) + result.leaked == pytest.approx(1, abs=1e-6)


class TestConformance:
    """Every method, with every input and unit, over every architecture."""

    @pytest.mark.parametrize(("name", "units", "arch", "kinds"), list(cases()))
    def test_what_is_supported_runs(
        self, made, models, tokenizer, name, units, arch, kinds
    ):
        """Tokens everywhere; templates where no tokens are needed."""
        llm_attr = made(name, models[arch])
        # It takes all subsets: the fewer units the better.
        prompt, target = (SHORT, " 4") if name == "shapley" else (PROMPT, TARGET)
        inputs = inputs_of_each_kind(tokenizer, prompt)
        for kind in kinds:
            try:
                result = explained(
                    llm_attr, inputs[kind], target, units=units, **few(name)
                )
            except ValueError as error:
                # One sentence before the first row is too few for a regression.
                if not re.match("(Lime|KernelShap): fits a regression", str(error)):
                    raise
                continue
            assert_sound(result)

    @pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("template")])
    @pytest.mark.parametrize(
        "name", [n for n, (_, d) in KNOWN.items() if d.tokens_only]
    )
    def test_templates_are_refused_where_tokens_are_needed(
        self, made, models, tokenizer, calls, name, kind
    ):
        """Before any model call; method and input are named."""
        llm_attr = made(name, models["llama"])
        inp = inputs_of_each_kind(tokenizer, PROMPT)[kind]
        told = f"{KNOWN[name][0].__name__} .*TextTemplateInput came"
        calls.clear()
        with pytest.raises(TypeError, match=told):
            explained(llm_attr, inp)
        assert calls == []

    @pytest.mark.parametrize("units", ["token", "sentence"])
    @every_method
    def test_images(self, made, models, vision_model, tokenizer, calls, name, units):
        """Attributed, or refused before any model call."""
        inp = image_input(tokenizer)
        if "images" in accepted_inputs(KNOWN[name][1]):
            llm_attr = made(name, vision_model)
            assert_sound(explained(llm_attr, inp, [5, 9], units=units, **few(name)))
            return
        llm_attr = made(name, models["llama"])
        told = f"{KNOWN[name][0].__name__} .*ImageMaskInput came"
        calls.clear()
        with pytest.raises(TypeError, match=told):
            explained(llm_attr, inp, units=units)
        assert calls == []

    @pytest.mark.parametrize(
        "name", [n for n, (_, d) in KNOWN.items() if d.wrapper == "perturbation"]
    )
    def test_remote_models(self, made, models, tokenizer, calls, name):
        """Asked, or refused before any request; Captum takes no gradient methods."""
        method, declared = KNOWN[name]
        base = bare(made(name, models["llama"]))
        provider = LocalProvider(models["llama"], tokenizer)
        llm_attr = RemoteLLMAttribution(base, tokenizer, provider)
        inp = inputs_of_each_kind(tokenizer, PROMPT)["tokens"]
        if "remote" in accepted_inputs(declared):
            target = " 4" if name == "shapley" else TARGET
            result = explained(llm_attr, inp, target, units="word", **few(name))
            assert_sound(result)
            return
        calls.clear()
        with pytest.raises(
            TypeError, match=f"{method.__name__} needs the model itself"
        ):
            explained(llm_attr, inp)
        assert calls == []
        assert provider.prompts == []

    @every_method
    def test_probabilities(self, made, models, tokenizer, calls, name):
        """Attributed, or refused before any model call."""
        method, declared = KNOWN[name]
        inp = inputs_of_each_kind(tokenizer, PROMPT)["tokens"]
        if declared.probabilities:
            llm_attr = made(name, models["llama"], attr_target="prob")
            assert_sound(explained(llm_attr, inp, units="word", **few(name)))
            return
        with pytest.raises(ValueError, match=f"'log_prob' for {method.__name__}"):
            made(name, models["llama"], attr_target="prob")
        if declared.wrapper == "perturbation":
            base = bare(made(name, models["llama"]))
            llm_attr = LLMAttribution(base, tokenizer, attr_target="prob")
            calls.clear()
            with pytest.raises(ValueError, match=f"'log_prob' for {method.__name__}"):
                explained(llm_attr, inp)
            assert calls == []

    @every_method
    def test_only_random_methods_are_random(self, made, models, tokenizer, name):
        """Of two seeds; of few units a method may take all samples there are."""
        declared = KNOWN[name][1]
        text, target = (LONG, LONG) if declared.random else (PROMPT, TARGET)
        llm_attr = made(name, models["llama"])
        inp = inputs_of_each_kind(tokenizer, text)["tokens"]
        one, other = (
            explained(llm_attr, inp, target, seed, **few(name)).graph.rows
            for seed in (0, 1)
        )
        differ = np.abs(one - other).max() > 1e-3 * np.abs(one).max()
        assert differ == declared.random

    @every_method
    def test_only_signed_methods_have_a_sign(self, made, models, tokenizer, name):
        """Something argues against something in these models."""
        inp = inputs_of_each_kind(tokenizer, PROMPT)["tokens"]
        lowest = min(
            explained(
                made(name, model), inp, units="word", **few(name)
            ).graph.rows.min()
            for model in models.values()
        )
        assert (lowest < 0) == KNOWN[name][1].signed

    @every_method
    def test_without_the_graph(self, made, models, tokenizer, name):
        """Captum's own object gives its own result."""
        llm_attr = made(name, models["llama"])
        inp = inputs_of_each_kind(tokenizer, "Ana has 3")["tokens"]
        arguments = few(name)
        if isinstance(llm_attr, LLMAttribution):
            arguments["use_cached_outputs"] = False
        target = torch.tensor(tokenizer.encode(TARGET)[:2])
        result = llm_attr.attribute(inp, target=target, **arguments)
        assert result.seq_attr.shape == (inp.n_itp_features,)
        assert torch.isfinite(result.seq_attr).all()


@pytest.fixture
def calls(models, monkeypatch):
    """Every pass through the small Llama."""
    asked = []
    kind = type(models["llama"])
    forward = kind.forward

    def recorded(*args, **kwargs):
        asked.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(kind, "forward", recorded)
    return asked


class TestDeclarations:
    """What is declared is complete, and fits what is there."""

    def test_names_are_unique(self):
        """Those of methods and those of classes, taken together."""
        spelled = [
            {declared.name, method.__name__.lower()}
            for method, declared in capabilities()
        ]
        assert len(set().union(*spelled)) == sum(map(len, spelled))

    @every_method
    def test_declarations_are_complete(self, name):
        """A short line, a paper and a cost; words of one kind."""
        _, declared = KNOWN[name]
        assert re.fullmatch(r"[a-z][a-z-]*[a-z]", declared.name)
        assert 10 < len(declared.summary) <= 64
        assert not declared.summary.endswith(".")
        assert re.search(r" \(?\d{4}\)?, (arXiv|doi):", declared.source)
        assert declared.cost

    @every_method
    def test_the_wrapper_is_the_one_that_takes_the_class(self, name):
        """Captum's objects say which these are."""
        method, declared = KNOWN[name]
        takes = {
            "gradient": LLMGradientAttribution.SUPPORTED_METHODS,
            "perturbation": LLMAttribution.SUPPORTED_METHODS,
        }
        assert issubclass(method, takes[declared.wrapper])

    @every_method
    def test_what_is_counted_is_an_argument(self, name):
        """Of ``attribute`` or of the constructor."""
        method, declared = KNOWN[name]
        if declared.counted is not None:
            taken = inspect.signature(method.attribute).parameters
            in_constructor = needs_argument(method, declared.counted) is not None
            assert declared.counted in taken or in_constructor

    def test_methods_of_this_package_are_found(self):
        """Each public class that declares something; what is abstract is none."""
        found = [method for method, _ in capabilities()]
        for name in catalogue.methods.__all__:
            method = getattr(catalogue.methods, name)
            declares = isinstance(getattr(method, "capability", None), Capability)
            assert (method in found) == declares
        assert TokenMethod not in found
        assert UnitMethod not in found


class TestNames:
    """A method by its name."""

    @every_method
    def test_a_name_and_the_name_of_the_class(self, name):
        """In any case."""
        method, declared = KNOWN[name]
        for spelled in (name, name.upper(), method.__name__, method.__name__.lower()):
            assert method_named(spelled) == (method, declared)

    @pytest.mark.parametrize("name", ["guess", "", "LayerGradientShap", None])
    def test_others_are_refused(self, name):
        """With all names there are."""
        with pytest.raises(ValueError, match="method: must be one of ablation, shap"):
            method_named(name)

    def test_what_a_class_declares(self):
        """Its own declaration, Captum's by this package, or None."""
        assert capability_of(FeatureAblation).name == "ablation"
        assert capability_of(LayerGradientShap) is None


class TestWrapping:
    """A Captum object, ready for the graph."""

    @pytest.mark.parametrize("by", ["name", "class"])
    @every_method
    def test_by_name_or_class(self, models, tokenizer, masked, name, by):
        """In the wrapper that the method declares, with the model and tokenizer."""
        method, declared = KNOWN[name]
        model = models["llama"]
        options = {
            option: value
            for option, value in masked.items()
            if needs_argument(method, option) is not None
        }
        asked = name if by == "name" else method
        found = llm_attribution(asked, model, tokenizer, **options)
        kind = LLMGradientAttribution if declared.wrapper == "gradient" else None
        assert type(found) is (kind or LLMAttribution)
        assert type(found.attr_method) is method
        assert found.model is model
        assert found.tokenizer is tokenizer
        if needs_argument(method, "layer"):
            assert found.attr_method.layer is model.get_input_embeddings()

    def test_options_go_to_the_method(self, models, tokenizer):
        """A layer, too, in place of the embeddings."""
        model = models["llama"]
        layer = model.model.layers[0]
        found = llm_attribution(
            "integrated-gradients",
            model,
            tokenizer,
            layer=layer,
            multiply_by_inputs=False,
        )
        assert found.attr_method.layer is layer
        assert not found.attr_method.multiplies_by_inputs

    def test_probabilities_can_be_asked_for(self, models, tokenizer):
        """Of the methods that attribute them."""
        found = llm_attribution(
            "ablation", models["llama"], tokenizer, attr_target="prob"
        )
        assert found.attr_target == "prob"
        with pytest.raises(ValueError, match="attr_target: must be one of"):
            llm_attribution("ablation", models["llama"], tokenizer, attr_target="x")

    def test_classes_without_a_name(self, models, tokenizer):
        """Captum's others and your own, as Captum's objects take them."""

        class Mine(FeatureAblation):
            def __init__(self, model, tokenizer, *, depth, **more):
                super().__init__(model)
                self.given = (tokenizer, depth, more)

        model = models["llama"]
        found = llm_attribution(Mine, model, tokenizer, depth=3, other=4)
        assert found.attr_method.given == (tokenizer, 3, {"other": 4})
        shap = llm_attribution(LayerGradientShap, model, tokenizer)
        assert type(shap) is LLMGradientAttribution
        with pytest.raises(TypeError, match="depth: Mine cannot do without it"):
            llm_attribution(Mine, model, tokenizer)

    @pytest.mark.parametrize("method", [LayerActivation, 5, len])
    def test_what_captum_does_not_take_is_refused(self, models, tokenizer, method):
        """A class of another kind, and no class."""
        with pytest.raises(TypeError, match="method: must be the name of a base meth"):
            llm_attribution(method, models["llama"], tokenizer)

    def test_unknown_options_are_refused(self, models, tokenizer):
        """Those that there are, are listed."""
        with pytest.raises(
            TypeError, match=r"deep: is no option of LayerGradientXActivation\. Its op"
        ):
            llm_attribution(
                LayerGradientXActivation, models["llama"], tokenizer, deep=1
            )

    def test_a_package_that_is_missing_is_named(self, models, tokenizer, monkeypatch):
        """With the command that installs it."""
        monkeypatch.setattr(catalogue, "find_spec", lambda _: None)
        with pytest.raises(ImportError, match=r"pip install captum-cage\[sklearn\]"):
            llm_attribution("lime", models["llama"], tokenizer)


class TestTables:
    """The tables of the documentation."""

    def test_every_method_has_a_row(self):
        """With its class, its name and whether it has an engine."""
        lines = markdown_table({"FeatureAblation"}).splitlines()
        assert len(lines) == 2 + len(KNOWN)
        assert len({line.count("|") for line in lines}) == 1
        ablation, sampling = lines[2:4]
        assert ablation.startswith("| `FeatureAblation`<br>`ablation` | ")
        assert ablation.split(" | ")[7] == "yes"
        assert sampling.split(" | ")[7] == ""

    def test_what_is_refused_is_what_is_not_declared(self):
        """Methods that need tokens, and those that need the model itself."""
        first, *others = unsupported_table().splitlines()[2:]
        refused = re.findall("`([a-z-]+)`", first.split(" | ")[1])
        assert set(refused) == {n for n, (_, d) in KNOWN.items() if d.tokens_only}
        assert any("clp-cage" in line for line in others)
        assert not any("`ablation`" in line for line in [first, *others])
