"""Models whose weights are on several devices, in main memory, or on a disk."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
from torch import nn

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage._placement import entry_device, is_dispatched, own_weights
from captum_cage._restored import evaluated
from captum_cage.fingerprint import model_digest
from captum_cage.methods import AttnLRP
from captum_cage.methods.catalogue import (
    capabilities,
    llm_attribution,
    missing_extra,
    needs_argument,
)
from captum_cage.metrics import parameter_randomization, randomized
from devices import several_devices
from test_methods_reagent import masked
from tiny import tiny_model, tiny_tokenizer

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")
MASKED = ("masked_lm", "masked_tokenizer")
PROMPT, TARGET = "Ana has 3.", " Mia has 4"
KNOWN = {declared.name: (method, declared) for method, declared in capabilities()}
PARTS = {
    "llama": {
        "first": ["model.embed_tokens", "model.rotary_emb", "model.layers.0"],
        "last": ["model.layers.1", "model.norm", "lm_head"],
    },
    # Tied: embeddings and output layer are one tensor, so both are in one place.
    "gemma3": {
        "first": ["model.embed_tokens", "lm_head", "model.rotary_emb"],
        "last": ["model.layers.0", "model.layers.1", "model.norm"],
    },
    "gpt2": {
        "first": ["transformer.wte", "lm_head", "transformer.wpe", "transformer.drop"],
        "last": ["transformer.h.0", "transformer.h.1", "transformer.ln_f"],
    },
}


def small(arch="llama"):
    """A small model of random weights and biases, in double precision."""
    model = tiny_model(arch, vocab_size=len(tiny_tokenizer())).double()
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=numbers)
    return model


def in_memory(arch, _):
    """All weights in main memory, none where the layers compute."""
    return accelerate.cpu_offload(small(arch), execution_device=CPU)


def on_disk(arch, folder):
    """All weights on disk."""
    return accelerate.disk_offload(small(arch), str(folder), execution_device=CPU)


def first_on_disk(arch, folder):
    """Embeddings and what else comes first on disk, the rest here."""
    return dispatched(arch, folder, "disk", "cpu")


def last_on_disk(arch, folder):
    """What comes last on disk."""
    return dispatched(arch, folder, "cpu", "disk")


def dispatched(arch, folder, first, last):
    """A model in two parts."""
    places = dict.fromkeys(PARTS[arch]["first"], first)
    places |= dict.fromkeys(PARTS[arch]["last"], last)
    return accelerate.dispatch_model(
        small(arch),
        places,
        main_device="cpu" if "disk" in (first, last) else first,
        offload_dir=str(folder),
        force_hooks=True,
    )


def any_meta(module):
    """Whether one of its own weights is kept elsewhere."""
    return any(one.is_meta for one in module.parameters(recurse=False))


def asked(name, model, strategy):
    """Raw rows of a short text, by a method; None if it has no such strategy."""
    method, declared = KNOWN[name]
    if missing_extra(declared):
        pytest.skip(f"{declared.extra} is not installed")
    options = {}
    if needs_argument(method, "masked_lm") is not None:
        options = dict(zip(MASKED, masked("bert"), strict=True))
    kwargs = {}
    if declared.counted is not None:
        in_constructor = needs_argument(method, declared.counted) is not None
        (options if in_constructor else kwargs)[declared.counted] = 3
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    tokenizer = tiny_tokenizer()
    cage = GraphContextAttribution(llm_attribution(name, model, tokenizer, **options))
    return cage.attribute(
        TokenIdsInput(tokenizer.encode(PROMPT), tokenizer),
        TARGET,
        units="sentence" if name == "shapley" else "word",
        strategy=strategy,
        **kwargs,
    ).graph.rows


@pytest.fixture(scope="module")
def expected():
    """Rows of the model that is whole, each computed once."""
    known, models = {}, {}

    def rows(name, arch, strategy):
        if (name, arch, strategy) not in known:
            models.setdefault(arch, small(arch))
            known[name, arch, strategy] = asked(name, models[arch], strategy)
        return known[name, arch, strategy]

    return rows


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """Models that are spread out, each made once."""
    known = {}

    def model(how, arch):
        if (how, arch) not in known:
            known[how, arch] = how(arch, tmp_path_factory.mktemp("weights"))
        return known[how, arch]

    return model


def cases():
    """Each method with all weights on disk, and where layers are read with more."""
    for name in KNOWN:
        yield pytest.param(name, on_disk, "llama", id=f"{name}-disk")
    reading = ("ifr", "attnlrp", "value-weighted-attention", "integrated-gradients")
    for name in (*reading, "ablation"):
        for arch in ("gemma3", "gpt2"):
            yield pytest.param(name, in_memory, arch, id=f"{name}-memory-{arch}")
        yield pytest.param(name, first_on_disk, "gpt2", id=f"{name}-first")
        yield pytest.param(name, last_on_disk, "llama", id=f"{name}-last")


class TestOffloaded:
    """Weights that are there in a layer's pass alone."""

    @pytest.mark.parametrize("strategy", ["auto", "loop"])
    @pytest.mark.parametrize(("name", "how", "arch"), list(cases()))
    def test_rows_are_those_of_the_whole_model(
        self, expected, placed, name, how, arch, strategy
    ):
        """By engine and by loop; what trains, trains as before."""
        model = placed(how, arch)
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        found = asked(name, model, strategy)
        wanted = expected(name, arch, strategy)
        assert np.abs(found - wanted).max() <= 1e-12 * np.abs(wanted).max()
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
        assert any(p.is_meta for p in model.parameters())

    def test_flags_that_an_interrupt_leaves_behind_are_undone(self, placed):
        """Though weights are other objects after each pass."""
        model = placed(in_memory, "gemma3")
        name, frozen = next(iter(model.named_parameters()))
        frozen.requires_grad_(False)
        before = {n: p.requires_grad for n, p in model.named_parameters()}

        with evaluated(model):
            model.requires_grad_(False)  # and nothing undoes it
            model(torch.tensor([[1, 2]]))
        after = {n: p.requires_grad for n, p in model.named_parameters()}
        model.get_parameter(name).requires_grad_(True)
        assert after == before

    @pytest.mark.parametrize("arch", PARTS)
    @pytest.mark.parametrize("how", [in_memory, on_disk, first_on_disk, last_on_disk])
    def test_a_spool_knows_the_weights_wherever_they_are(self, placed, how, arch):
        """Also while a layer's are brought, as an interrupt may leave them."""
        model = placed(how, arch)
        expected = model_digest(small(arch))
        assert model_digest(model) == expected
        layer = next(m for m in model.modules() if any_meta(m))
        with own_weights(layer):
            assert not any_meta(layer)
            assert model_digest(model) == expected

    def test_a_spool_tells_offloaded_models_apart(self):
        """By their numbers."""
        models = [tiny_model(vocab_size=9, seed=seed) for seed in (0, 1)]
        one, other = (accelerate.cpu_offload(model, CPU) for model in models)
        assert model_digest(one) != model_digest(other)

    def test_text_can_be_generated(self, placed):
        """The same text."""
        tokenizer = tiny_tokenizer()
        written = []
        for model in (small(), placed(on_disk, "llama")):
            cage = GraphContextAttribution(
                LLMAttribution(FeatureAblation(model), tokenizer)
            )
            inp = TextTokenInput(PROMPT, tokenizer)
            found = cage.attribute(inp, gen_args={"max_new_tokens": 4})
            written.append((found.output_tokens, found.seq_attr.tolist()))
        assert written[0] == written[1]

    def test_what_constants_absorb_is_known(self, placed):
        """Biases and positions that are not there after their layer's pass."""
        ids = torch.tensor(tiny_tokenizer().encode(PROMPT))
        wanted = AttnLRP(small("gpt2")).conservation(ids, 5)
        assert AttnLRP(placed(in_memory, "gpt2")).conservation(ids, 5) == wanted
        assert wanted.biases != 0
        assert wanted.positions != 0

    def test_the_object_that_is_wrapped_stays_as_it_is(self, placed):
        """It sends ids to where the model says it is; ours sends them elsewhere."""
        llm_attr = LLMAttribution(
            FeatureAblation(placed(on_disk, "llama")), tiny_tokenizer()
        )
        before = dict(vars(llm_attr))
        cage = GraphContextAttribution(llm_attr)
        assert vars(llm_attr) == before
        assert llm_attr.device.type == "meta"
        assert cage.llm_attr.device == CPU
        assert cage.llm_attr.attr_method.forward_func.__self__ is cage.llm_attr

    def test_a_device_that_the_user_has_set_stays(self, placed):
        """Whatever the hooks say."""
        llm_attr = LLMAttribution(
            FeatureAblation(placed(on_disk, "llama")), tiny_tokenizer()
        )
        llm_attr.device = torch.device("cuda", 7)
        assert GraphContextAttribution(llm_attr).llm_attr.device == llm_attr.device

    def test_weights_that_are_away_cannot_be_shuffled(self, placed):
        """Before anything is asked of the model."""
        tokenizer = tiny_tokenizer()
        model = placed(on_disk, "llama")
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        result = cage.attribute(TextTokenInput(PROMPT, tokenizer), TARGET)
        with pytest.raises(ValueError, match="model: its weights must be in memory"):
            parameter_randomization(result)
        with (
            pytest.raises(ValueError, match="model: its weights must be in memory"),
            randomized(model),
        ):
            pass


class TestSeveralDevices:
    """Layers on one device, and those behind them on another."""

    @pytest.mark.parametrize("name", KNOWN)
    def test_rows_are_those_of_one_device(self, expected, name):
        """Every tensor is brought to where it is needed."""
        with several_devices():
            model = dispatched("llama", None, "cpu:1", "cpu:2")
            assert {str(p.device) for p in model.parameters()} == {"cpu:1", "cpu:2"}
            found = asked(name, model, "auto")
        wanted = expected(name, "llama", "auto")
        assert np.abs(found - wanted).max() <= 1e-12 * np.abs(wanted).max()

    @pytest.mark.parametrize("arch", ["gemma3", "gpt2"])
    @pytest.mark.parametrize("name", ["ifr", "attnlrp", "gradient-x-activation", "clp"])
    def test_of_other_architectures(self, expected, name, arch):
        """Norms behind blocks, biases, positions; by the loop, too."""
        for strategy in ("auto", "loop"):
            with several_devices():
                model = dispatched(arch, None, "cpu:1", "cpu:2")
                found = asked(name, model, strategy)
            wanted = expected(name, arch, strategy)
            assert np.abs(found - wanted).max() <= 1e-12 * np.abs(wanted).max()

    def test_what_constants_absorb_is_known(self):
        """Wherever they are."""
        ids = torch.tensor(tiny_tokenizer().encode(PROMPT))
        wanted = AttnLRP(small("gpt2")).conservation(ids, 5)
        with several_devices():
            model = dispatched("gpt2", None, "cpu:1", "cpu:2")
            assert AttnLRP(model).conservation(ids, 5) == wanted

    def test_a_device_that_is_forgotten_is_found(self):
        """The simulation fails where GPUs would."""
        with several_devices():
            one, other = torch.ones(2, device="cpu:1"), torch.ones(2, device="cpu:2")
            with pytest.raises(RuntimeError, match="on the same device"):
                one + other
            with pytest.raises(RuntimeError, match="on the same device"):
                one[torch.tensor([0], device="cpu:2")]
            with pytest.raises(RuntimeError, match="on the same device"):
                one + torch.ones(2)
            assert (one + other.to("cpu:1")).device == torch.device("cpu:1")
            assert (one + other.cpu().sum()).tolist() == [3, 3]


class TestEntryDevice:
    """Where ids go."""

    @pytest.mark.parametrize("device", ["cuda:0", torch.device("cuda", 0)])
    def test_as_hooks_say(self, device):
        """The first one that names a device, also of several at one module."""
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        model._hf_hook = SimpleNamespace(execution_device=None)
        hook = SimpleNamespace(execution_device=device)
        model[0]._hf_hook = SimpleNamespace(hooks=(hook,))
        model[1]._hf_hook = SimpleNamespace(execution_device="cpu")
        assert entry_device(model) == torch.device("cuda", 0)
        assert is_dispatched(model)

    def test_as_the_model_says(self):
        """Where there are no hooks, and none that names a device."""
        model = nn.Linear(1, 1)
        assert entry_device(model) == CPU
        model.device = "cuda:1"
        model._hf_hook = SimpleNamespace(execution_device="meta")
        assert entry_device(model) == torch.device("cuda", 1)
        assert entry_device(object()) == CPU
        assert not is_dispatched(object())


class TestOwnWeights:
    """Weights that are read without a pass."""

    def test_they_come_and_go(self, placed):
        """What is taken inside stays whole."""
        whole, model = small(), placed(on_disk, "llama")
        name = "model.layers.1.self_attn.o_proj"
        layer, wanted = model.get_submodule(name), whole.get_submodule(name).weight
        with own_weights(layer):
            taken = layer.weight.detach()
        assert layer.weight.is_meta
        assert torch.equal(taken, wanted)

    def test_they_go_when_something_is_raised(self, placed):
        """As at the end of a pass."""
        layer = placed(on_disk, "llama").model.norm
        with pytest.raises(KeyError), own_weights(layer):
            raise KeyError
        assert layer.weight.is_meta

    def test_weights_that_are_there_stay(self):
        """The very objects; and those that nobody can bring."""
        layer = nn.Linear(1, 1)
        before = layer.weight
        with own_weights(layer):
            assert layer.weight is before
        with own_weights(layer.to("meta")):
            assert layer.weight.is_meta
