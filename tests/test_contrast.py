"""Contrastive rows, against plain rows and logit differences attributed slowly."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import random
import re
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientXActivation,
    Lime,
    LLMAttribution,
    LLMGradientAttribution,
    ProductBaselines,
    RemoteLLMAttribution,
    TextTemplateInput,
    TextTokenInput,
)
from transformers import BertConfig, BertForMaskedLM

from captum_cage import (
    AttributionGraph,
    ChatTokenInput,
    GraphContextAttribution,
    TokenIdsInput,
    TraceIdsInput,
)
from captum_cage.contrast import (
    Contrast,
    contrast_row,
    contrasts,
    same_draws,
    tokens_of,
)
from captum_cage.engines.registry import engine_names
from captum_cage.inputs import Prompt
from captum_cage.methods import AttentionSuppression
from captum_cage.methods.catalogue import (
    capabilities,
    llm_attribution,
    missing_extra,
    needs_argument,
)
from captum_cage.methods.reagent import refilled
from captum_cage.task import RowTask, text_units
from captum_cage.units import split_units
from test_methods_subsets import fitted, of_the_authors
from tiny import LocalProvider, image_input, tiny_model, tiny_tokenizer

PROMPT = "Ana has 3 pens."
TARGET = " Mia has 7 pens. So 7."
KNOWN = {declared.name: (method, declared) for method, declared in capabilities()}
# Rows of these are the same whatever is written.
BLIND = (
    "mean-attention",
    "attention-rollout",
    "value-weighted-attention",
    "ifr",
    "clp",
)
CONTRASTED = [name for name in KNOWN if name not in BLIND]
RANDOM = [name for name in CONTRASTED if KNOWN[name][1].random]
FEW = 3  # samples, steps or refills
WAYS = [
    (name, strategy)
    for name in CONTRASTED
    for strategy in ("loop", "fused")
    if strategy == "loop" or KNOWN[name][0].__name__ in engine_names()
]
every_way = pytest.mark.parametrize(("name", "strategy"), WAYS)


@pytest.fixture(scope="module")
def model(tokenizer):
    """A small Llama in float64."""
    return tiny_model(vocab_size=len(tokenizer), dtype=torch.float64)


@pytest.fixture(scope="module")
def masked():
    """A small masked language model and its tokenizer, as options."""
    kind = copy.deepcopy(tiny_tokenizer("wordpiece"))
    kind.add_special_tokens({"mask_token": "[MASK]"})
    config = BertConfig(
        vocab_size=len(kind),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "masked_lm": BertForMaskedLM(config).eval(),
            "masked_tokenizer": kind,
        }


def wrapped(name, model, tokenizer, masked=None, **more):
    """A base method by its name, with all that it needs."""
    method, declared = KNOWN[name]
    if missing_extra(declared):
        pytest.skip(f"{declared.extra} is not installed")
    for option, value in (masked or {}).items():
        if needs_argument(method, option) is not None:
            more.setdefault(option, value)
    if declared.counted and needs_argument(method, declared.counted) is not None:
        more.setdefault(declared.counted, FEW)
    return llm_attribution(name, model, tokenizer, **more)


def few(name, count=FEW):
    """Arguments of ``attribute`` that keep the number of evaluations small."""
    method, declared = KNOWN[name]
    if declared.counted in inspect.signature(method.attribute).parameters:
        return {declared.counted: count}
    return {}


def linear(name):
    """Options by which what Lime fits is linear in what it is given."""
    return {"interpretable_model": SkLearnLinearRegression()} if name == "lime" else {}


def by_gradients(model, tokenizer, **more):
    """Gradient times embedding with the graph: a pass and a gradient for each row."""
    method = LayerGradientXActivation(model, model.get_input_embeddings())
    llm_attr = LLMGradientAttribution(method, tokenizer)
    return GraphContextAttribution(llm_attr, **more)


def by_ablation(model, tokenizer, **more):
    """Ablation with the graph."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    return GraphContextAttribution(llm_attr, **more)


def state():
    """Where the random numbers stand."""
    return torch.get_rng_state(), np.random.get_state()  # noqa: NPY002


def restore(found):
    """Draw the numbers after a state once more."""
    torch.set_rng_state(found[0])
    np.random.set_state(found[1])  # noqa: NPY002


def seed(number=0):
    """Begin with the random numbers of a seed."""
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002


def assert_same(found, expected, allowed=1e-9):
    """Equal to a share of the largest entry, of which there must be one."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    largest = np.abs(expected).max()
    assert largest > 0
    assert np.abs(found - expected).max() <= allowed * largest


def task_of(llm_attr, inp, generated, units="token"):
    """What is explained, as the wrapper reads it."""
    tokenizer = llm_attr.tokenizer
    prompt = Prompt.read(inp, tokenizer)
    found = text_units(prompt, generated, split_units(units), tokenizer)
    return RowTask(
        llm_attr,
        prompt,
        tuple(generated),
        found.text,
        found.sources,
        found.steps,
        0,
        {},
    )


@lru_cache(maxsize=4096)
def logs_of(model, ids):
    """Log-probability of every token after each of some ids; each pass is made once."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return logits.log_softmax(-1)


def log_probability(model, before, target):
    """Log-probability of the ids of a text after others, by one plain pass."""
    logs = logs_of(model, (*before, *target))
    places = range(len(before) - 1, len(before) + len(target) - 1)
    return sum(float(logs[i, token]) for i, token in zip(places, target, strict=True))


# --- one row is the difference of two ------------------------------------------------


class TestDifference:
    """A contrastive row is the target's plain row less the foil's."""

    @every_way
    def test_it_is_the_difference_of_two_plain_runs(
        self, model, tokenizer, masked, name, strategy
    ):
        """One with what was written as the last token, one with the foil."""
        llm_attr = wrapped(name, model, tokenizer, masked)
        cage = GraphContextAttribution(llm_attr)
        prompt = tokenizer.encode("Ana has")
        ids = tokenizer.encode(" Mia has 4 pens")[:3]
        place = 1
        if name in RANDOM:  # only one row, so that nothing else is drawn
            prompt, ids, place = [*prompt, ids[0]], ids[1:2], 0
        foil = tokenizer.encode(" pens")[0]

        def rows(ids, **more):
            inp = TokenIdsInput(prompt, tokenizer)
            arguments = {**few(name), "strategy": strategy, **more}
            return cage.attribute(inp, ids, **arguments).graph.rows

        seed()
        first = rows(ids)
        after = state()
        target = rows(ids[: place + 1])[-1]
        restore(after)
        other = rows([*ids[:place], foil])[-1]
        seed()
        found = rows(ids, foil={place: foil})
        width = len(prompt) + place
        assert_same(found[place, :width], (target - other)[:width])
        assert (found[place, width:] == 0).all()
        if name not in RANDOM:
            # The other rows are what they were.
            later = [step for step in range(len(ids)) if step != place]
            assert_same(found[later], first[later], 1e-12)
        elif name not in ("c-lime", "reagent"):  # which see all there is to see here
            assert np.abs(first[0] - target).max() > 1e-3 * np.abs(target).max()

    @pytest.mark.parametrize("name", ["shapley-sampling", "kernel-shap", "lime"])
    def test_random_methods_draw_the_same_for_both(self, model, tokenizer, name):
        """Also amid other rows; the generator goes on after the second draw."""
        llm_attr = wrapped(name, model, tokenizer, **linear(name))
        cage = GraphContextAttribution(llm_attr)
        inp = TokenIdsInput(tokenizer.encode(PROMPT * 2), tokenizer)
        ids = tokenizer.encode(TARGET)
        foil = tokenizer.encode("9")[0]

        def last(ids, **more):
            # The other rows are not needed, so that nothing else is drawn before.
            seed()
            only = {"strategy": "loop", "tolerance": 0.99, "n_samples": 15}
            found = cage.attribute(inp, ids, explain=-1, **only, **more)
            assert found.rows_computed == 1
            return found.graph.rows[-1], state()

        (target, after), (other, _) = last(ids[:4]), last([*ids[:3], foil])
        found, finally_ = last(ids[:4], foil={-1: foil})
        assert_same(found, target - other)
        assert torch.equal(after[0], finally_[0])

    @pytest.mark.parametrize("strategy", ["loop", "auto"])
    def test_baselines_that_are_drawn_are_the_same_for_both(
        self, model, tokenizer, strategy
    ):
        """Also for a method that is not random itself."""
        choices = ProductBaselines([["Mia", "So", "read"], ["texts", "dollars"]])
        inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"], baselines=choices)
        cage = by_ablation(model, tokenizer)

        def row(ids, **more):
            return cage.attribute(inp, ids, strategy=strategy, **more).graph.rows[0]

        for number in range(3):
            random.seed(number)
            row([9])  # what is drawn for the plain row
            after = random.getstate()
            target = row([9])
            random.setstate(after)
            other = row([12])
            random.seed(number)
            assert_same(row([9], foil={0: 12}), target - other)

    def test_the_numbers_of_the_device_are_drawn_again(self, monkeypatch):
        """Captum's Lime draws where the model is."""
        forked = []

        @contextmanager
        def fork_rng(devices):
            forked.append(list(devices))
            yield

        monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
        for device in ("cpu", "cuda:1", torch.device("cuda")):
            with same_draws(SimpleNamespace(device=device)):
                pass
        assert forked == [[], [torch.device("cuda:1")], [torch.device("cuda")]]

    @pytest.mark.parametrize("place", [0, 4])
    def test_two_ways_give_one_row(self, model, tokenizer, place):
        """Whether the plain row is known or computed along with the foil's."""
        llm_attr = wrapped("ablation", model, tokenizer)
        inp = TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)
        ids = tokenizer.encode(TARGET)
        task = task_of(llm_attr, inp, ids)
        (contrast,) = contrasts(task, {place: 9})
        assert contrast == Contrast(place, place, place + 1, (9,), contrast.foil)
        plain = by_ablation(model, tokenizer).attribute(inp, ids).graph.rows[place]
        found = [
            contrast_row(task, contrast, strategy, set(), known)
            for strategy in ("loop", "fused")
            for known in (None, plain)
        ]
        for one in found[1:]:
            assert_same(one, found[0])

    def test_a_known_row_is_not_computed_again(self, model, tokenizer, monkeypatch):
        """A contrastive row costs one row more, two where nothing is known."""
        asked = []
        attribute = FeatureAblation.attribute

        def counted(*args, **kwargs):
            asked.append(1)
            return attribute(*args, **kwargs)

        monkeypatch.setattr(FeatureAblation, "attribute", counted)
        cage = by_ablation(model, tokenizer)
        inp = TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)
        ids = tokenizer.encode(TARGET)
        cage.attribute(inp, ids, strategy="loop", foil={3: 9})
        assert len(asked) == len(ids) + 1
        asked.clear()
        cage.attribute(inp, ids, strategy="loop", foil={3: 9}, tolerance=0.99)
        assert len(asked) == 2


# --- the logit difference, attributed slowly -----------------------------------------


class Slow:
    """Attributions of the difference of two logits, written out.

    Args:
        llm_attr: whose base method it is compared with.
        ids (list[int]): the text before the place.
        target (int): what was written there.
        foil (int): what might stand there.
    """

    def __init__(self, llm_attr, ids, target, foil):
        self.model, self.method = llm_attr.model, llm_attr.attr_method
        self.tokenizer = llm_attr.tokenizer
        self.ids, self.target, self.foil = list(ids), target, foil
        self.units = range(len(ids))

    def difference(self, ids):
        """Of the two logits after some ids."""
        with torch.no_grad():
            last = self.model(torch.tensor([ids])).logits[0, -1]
        return float(last[self.target] - last[self.foil])

    def without(self, absent):
        """The same where some units are the baseline."""
        ids = [0 if i in absent else token for i, token in enumerate(self.ids)]
        return self.difference(ids)

    def from_mask(self, mask):
        """The same, of the units that a tensor of zeros and ones says are present."""
        absent = {i for i in self.units if not mask[0, i]}
        return torch.tensor([self.without(absent)], dtype=torch.float64)

    def gradient(self, embedded):
        """Of the difference with respect to the embeddings."""
        leaf = embedded.detach().clone().requires_grad_()
        last = self.model(inputs_embeds=leaf[None]).logits[0, -1]
        return torch.autograd.grad(last[self.target] - last[self.foil], leaf)[0]

    def embedded(self):
        """Embeddings of the text and of a text of baselines."""
        table = self.model.get_input_embeddings().weight.detach()
        return table[self.ids], table[[0] * len(self.ids)]

    def ablation(self):
        """What is lost without a unit."""
        return [self.without({}) - self.without({unit}) for unit in self.units]

    def shapley(self):
        """Mean over all orders of the units."""
        orders = list(itertools.permutations(self.units))
        return self._of_orders(orders)

    def shapley_sampling(self):
        """Mean over the orders that are drawn."""
        return self._of_orders(
            [torch.randperm(len(self.ids)).tolist() for _ in range(FEW)]
        )

    def _of_orders(self, orders):
        found = np.zeros(len(self.ids))
        for order in orders:
            for place, unit in enumerate(order):
                absent = set(order[place:])
                found[unit] += self.without(absent - {unit}) - self.without(absent)
        return found / len(orders)

    def lime(self):
        """Captum's own, of a function of the present units."""
        return self._of_captum(
            Lime(self.from_mask, interpretable_model=SkLearnLinearRegression())
        )

    def kernel_shap(self):
        """Captum's own, of a function of the present units."""
        return self._of_captum(KernelShap(self.from_mask))

    def _of_captum(self, method):
        ones = torch.ones((1, len(self.ids)), dtype=torch.float64)
        return method.attribute(ones, n_samples=MANY)[0].numpy()

    def c_lime(self):
        """The weighted fit to all sets of one and of two units."""
        sets = [s for k in range(3) for s in itertools.combinations(self.units, k)]
        return fitted(len(self.ids), sets, [self.without(set(one)) for one in sets])

    def l_shap(self):
        """Over the neighbours of each unit."""
        return of_the_authors(self.without, len(self.ids), 2, 2)

    def integrated_gradients(self):
        """Points and weights of Gauss and Legendre on the way from the baselines."""
        points, weights = np.polynomial.legendre.leggauss(FEW)
        here, there = self.embedded()
        # Captum rounds the weights to float32.
        total = sum(
            float(np.float32(weight / 2))
            * self.gradient(there + (point + 1) / 2 * (here - there))
            for point, weight in zip(points, weights, strict=True)
        )
        return ((here - there) * total).sum(-1).numpy()

    def attention_x_ig(self):
        """The same, times the attention of the position before the place."""
        ids = torch.tensor(self.ids)
        attention = self.method.attention(ids, torch.tensor([self.target]))[0]
        return attention.numpy() * self.integrated_gradients()

    def gradient_x_activation(self):
        """Gradient times embedding."""
        here, _ = self.embedded()
        return (here * self.gradient(here)).sum(-1).numpy()

    def attnlrp(self):
        """The same, where gradients follow the rules."""
        with self.method.rules(torch.tensor(self.ids)):
            return self.gradient_x_activation()

    def gradient_shap(self):
        """Mean over the points that are drawn."""
        here, there = self.embedded()
        points, differences = self.method.draw(here, there[None], FEW, 0.0)
        found = sum(
            self.gradient(point) * difference
            for point, difference in zip(points, differences, strict=True)
        )
        return (found / FEW).sum(-1).numpy()

    def attention_suppression(self):
        """What is lost where later tokens do not attend to a unit."""
        found = []
        for unit in self.units:
            inside = torch.tensor([[i == unit for i in self.units]])
            with self.method.suppressed(inside):
                suppressed = self.difference(self.ids)
            found.append(self.difference(self.ids) - suppressed)
        return found

    def one_shot_reagent(self):
        """What is lost where a unit is refilled."""
        found = []
        for unit in self.units:
            stretches = self.method.refill(self.ids, np.array([unit]), 3)
            found.append(
                self.without({}) - self.difference(refilled(self.ids, stretches))
            )
        return found


MANY = 30  # samples of a regression that has one solution
SLOW = {
    name: getattr(Slow, name.replace("-", "_"))
    for name in CONTRASTED
    if hasattr(Slow, name.replace("-", "_"))
}
# What these attribute is not linear in the log-probability.
OTHERS = {"context-cite", "reagent", "clp-cage"}


def test_every_method_that_is_linear_has_a_slow_one():
    """None of the catalogue is forgotten."""
    assert set(SLOW) == set(CONTRASTED) - OTHERS


@pytest.mark.parametrize(("name", "strategy"), [w for w in WAYS if w[0] in SLOW])
def test_a_row_is_the_direct_attribution_of_the_logit_difference(
    tokenizer, masked, name, strategy
):
    """What the softmax takes away from one logit it takes from the other, too."""
    model = tiny_model("gpt2", vocab_size=len(tokenizer), dtype=torch.float64)
    llm_attr = wrapped(name, model, tokenizer, masked, **linear(name))
    prompt, ids = tokenizer.encode("Ana has 3"), tokenizer.encode(" Mia has")
    target, foil = ids[1], tokenizer.encode(" pens")[0]
    if name in RANDOM:  # only one row, so that nothing else is drawn
        prompt, ids = [*prompt, ids[0]], ids[1:]
    regression = name in ("lime", "kernel-shap")
    seed()
    result = GraphContextAttribution(llm_attr).attribute(
        TokenIdsInput(prompt, tokenizer),
        ids,
        foil={-1: foil},
        strategy=strategy,
        **few(name, MANY if regression else FEW),
    )
    seed()
    slow = Slow(llm_attr, [*prompt, *ids[:-1]], target, foil)
    plain = SLOW[name](slow)  # what is drawn for the plain row
    expected = SLOW[name](slow) if name in RANDOM else plain
    # Captum adds these up in float32.
    rounded = regression or (strategy == "loop" and name.startswith("shapley"))
    assert_same(result.graph.rows[-1, :-1], expected, 1e-6 if rounded else 1e-9)


class TestMethods:
    """Which base methods have contrastive rows."""

    @pytest.mark.parametrize("name", BLIND)
    def test_rows_that_are_the_same_for_every_token_are_refused(
        self, model, tokenizer, monkeypatch, name
    ):
        """Before any model call, by the name of the method."""
        asked = []
        monkeypatch.setattr(type(model), "forward", lambda *_, **__: asked.append(1))
        cage = GraphContextAttribution(wrapped(name, model, tokenizer))
        inp = TokenIdsInput([8, 9], tokenizer)
        match = f"foil: the base method's rows .* those of {KNOWN[name][0].__name__}"
        with pytest.raises(ValueError, match=match):
            cage.attribute(inp, [10, 11], foil={1: 12})
        assert not asked

    def test_the_rows_of_these_are_the_same_indeed(self, model, tokenizer):
        """What is refused is so for its reason, and nothing else is."""
        inp = TokenIdsInput([8, 9, 10], tokenizer)
        for name in set(KNOWN) - {"reagent", "one-shot-reagent"}:
            cage = GraphContextAttribution(wrapped(name, model, tokenizer))
            found = []
            for ids in ([20, 21], [20, 22]):
                seed()
                found.append(cage.attribute(inp, ids, **few(name)).graph.rows[1])
            differ = np.abs(found[0] - found[1]).max() > 1e-9
            assert differ == (name not in BLIND), name

    def test_a_divergence_of_whole_distributions_is_refused(self, model, tokenizer):
        """The same class with another effect is taken."""
        inp = TokenIdsInput([8, 9], tokenizer)
        for effect in ("kl", "log_prob"):
            method = AttentionSuppression(model, effect)
            cage = GraphContextAttribution(LLMAttribution(method, tokenizer))
            if effect == "log_prob":
                assert cage.attribute(inp, [10, 11], foil={1: 12}).foils
                continue
            with pytest.raises(ValueError, match=r"foil: .* AttentionSuppression are"):
                cage.attribute(inp, [10, 11], foil={1: 12})

    def test_methods_of_your_own_are_taken_unless_they_say_no(self, model, tokenizer):
        """A class without a declaration may be random: both rows are drawn alike."""

        class Noisy(FeatureAblation):
            def attribute(self, inputs, *args, **kwargs):
                found = super().attribute(inputs, *args, **kwargs)
                noise = torch.rand(1).item() + np.random.rand()  # noqa: NPY002
                return found + noise + random.random()

        class Blind(FeatureAblation):
            depends_on_target = False

        inp, ids = TokenIdsInput([8, 9], tokenizer), [10, 11]
        plain = by_ablation(model, tokenizer).attribute(inp, ids, foil={1: 12})
        cage = GraphContextAttribution(LLMAttribution(Noisy(model), tokenizer))
        found = cage.attribute(inp, ids, foil={1: 12})
        assert_same(found.graph.rows[1], plain.graph.rows[1], 1e-6)
        cage = GraphContextAttribution(LLMAttribution(Blind(model), tokenizer))
        with pytest.raises(ValueError, match="those of Blind are the same"):
            cage.attribute(inp, ids, foil={1: 12})

    @pytest.mark.parametrize("units", ["token", "sentence"])
    def test_probabilities_are_contrasted_as_they_are(self, model, tokenizer, units):
        """Those after what was written before, in the same unit, too."""
        method = FeatureAblation(model)
        llm_attr = LLMAttribution(method, tokenizer, attr_target="prob")
        prompt = tokenizer.encode("Ana has.")
        ids, foil = tokenizer.encode("Mia has"), tokenizer.encode(" pens")
        result = GraphContextAttribution(llm_attr).attribute(
            TokenIdsInput(prompt, tokenizer), ids, units=units, foil={"has": foil}
        )
        before = [*prompt, *ids[:-1]]
        groups = task_of(llm_attr, TokenIdsInput(prompt, tokenizer), ids, units)
        expected = np.zeros(len(result.units))
        for unit in range(len(expected) - 1):
            without = [
                0 if group == unit else token
                for token, group in zip(before, groups.unit_of_token(), strict=False)
            ]
            for sign, target in ((1, ids[-1:]), (-1, foil)):
                whole = math.exp(log_probability(model, before, target))
                left = math.exp(log_probability(model, without, target))
                expected[unit] += sign * (whole - left)
        assert_same(result.graph.rows[result.foils[0].unit], expected, 1e-5)


# --- places and foils ----------------------------------------------------------------


@pytest.fixture(scope="module")
def task(model, tokenizer):
    """A task of tokens over the small text."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    inp = TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)
    return task_of(llm_attr, inp, tokenizer.encode(TARGET))


def read(task):
    """The texts of the generated tokens of a task."""
    text = task.generated_text
    return [text.text[slice(*span)] for span in text.offsets]


class TestPlaces:
    """What a key of ``foil=`` means."""

    def test_positions_and_texts(self, task):
        """Of units; a text is its last occurrence, whole tokens."""
        words = read(task)
        assert words == [
            *(" Mia", " has", " ", "7", " pens", "."),
            " So",
            " ",
            "7",
            ".",
        ]
        for place in range(-10, 10):
            start = place % 10
            assert tokens_of(task, place, "foil") == (start, start + 1)
        assert tokens_of(task, np.int64(3), "foil") == (3, 4)
        assert tokens_of(task, "7", "foil") == (8, 9)
        assert tokens_of(task, "7 pens", "foil") == (3, 5)
        assert tokens_of(task, " 7 ", "foil") == (3, 4)
        assert tokens_of(task, "en", "foil") == (4, 5)
        assert tokens_of(task, re.compile(r"\d"), "foil") == (8, 9)
        assert tokens_of(task, re.compile(r"\d(?= pens)"), "foil") == (3, 4)

    def test_positions_are_those_of_units(self, model, tokenizer):
        """Also where these are larger than a token."""
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
        inp = TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)
        task = task_of(llm_attr, inp, tokenizer.encode(TARGET), "word")
        assert [unit.text for unit in task.steps.units] == TARGET.split()
        assert tokens_of(task, 1, "foil") == (1, 3)
        assert tokens_of(task, -1, "foil") == (8, 10)
        assert tokens_of(task, "7", "foil") == (8, 9)

    @pytest.mark.parametrize(
        ("key", "error", "match"),
        [
            (
                10,
                ValueError,
                r"foil: must be at least -10 and less than 10, but 10 came",
            ),
            (-11, ValueError, "foil: must be at least -10"),
            (
                True,
                TypeError,
                "foil: must name a place in the generated text, but bool",
            ),
            (None, TypeError, "foil: must name a place"),
            (1.0, TypeError, "foil: must name a place"),
            ((0, 1), TypeError, "foil: must name a place"),
            ("9", ValueError, "the text '9' does not occur in the generated text"),
            (" ", ValueError, "must stand for visible text"),
            (re.compile("x*"), ValueError, "must stand for visible text"),
        ],
    )
    def test_other_places_are_refused(self, task, key, error, match):
        """With what there is."""
        with pytest.raises(error, match=match):
            contrasts(task, {key: 9})


class TestFoils:
    """What a value of ``foil=`` means."""

    def found(self, task, place, foil):
        """First token, the one after the last, and ids of the foil."""
        (contrast,) = contrasts(task, {place: foil})
        assert contrast.step == task.steps.groups[contrast.start]
        assert contrast.foil.unit == contrast.step
        return contrast.start, contrast.stop, list(contrast.ids)

    @pytest.mark.parametrize(
        "foil", [31, np.int64(31), [31], (31,), np.array([31]), torch.tensor([[31]])]
    )
    def test_ids_are_taken_as_they_are(self, task, foil):
        """One or several, in any form."""
        assert self.found(task, 8, foil) == (8, 9, [31])

    def test_a_text_gets_the_white_space_that_was_written(self, task, tokenizer):
        """Unless it has its own."""
        pens, texts = tokenizer.encode(" texts"), tokenizer.encode("texts")
        assert pens != texts
        assert self.found(task, "pens", "texts") == (4, 5, pens)
        assert self.found(task, " pens", "texts") == (4, 5, pens)
        assert self.found(task, 4, "texts") == (4, 5, pens)
        assert self.found(task, 4, " texts") == (4, 5, pens)
        assert self.found(task, 8, "9") == (8, 9, tokenizer.encode("9"))

    def test_a_text_that_is_part_of_a_token_gets_the_rest_of_it(self, task, tokenizer):
        """A token is replaced whole, so what surrounds the text is written again."""
        assert self.found(task, "en", "in") == (4, 5, tokenizer.encode(" pins"))
        assert self.found(task, "Mi", "A") == (0, 1, tokenizer.encode(" Aa"))

    def test_a_common_beginning_is_left_out(self, task, tokenizer):
        """The first token that differs is contrasted, after those that do not."""
        nine = tokenizer.encode("9")
        assert self.found(task, "has 7", [296, 227, *nine]) == (3, 4, nine)
        other = [tokenizer.encode("7 pens")[0], *tokenizer.encode(" So")]
        assert self.found(task, "7 pens", other) == (4, 5, other[1:])

    @pytest.mark.parametrize(("place", "count"), [("7 pens", 1), ("7", 3)])
    def test_the_beginning_of_what_was_written_is_no_foil(
        self, task, tokenizer, place, count
    ):
        """Nor the other way round: one would not be in the other's place."""
        pens = tokenizer.encode("7 pens.")[:count]
        with pytest.raises(ValueError, match="one is the beginning of the other"):
            self.found(task, place, pens)

    def test_where_the_beginning_of_a_text_is_common(self, task):
        """As for ids: the unit in which they begin to differ has the foil."""
        (contrast,) = contrasts(task, {"7 pens": "7 texts"})
        assert (contrast.start, contrast.stop) == (4, 5)
        assert contrast.foil.target == " pens"
        assert contrast.foil.text == " texts"

    @pytest.mark.parametrize(
        ("kind", "written", "place", "foil", "target", "text"),
        [
            ("bpe", " Mia has 18 pens.", "18", "19", " 18", " 19"),
            ("bpe", " So 18=18.", re.compile("(?<==)18"), "9", "18", "9"),
            ("bpe", " So 😀.", "😀", "日", "😀", "日"),
            ("sentencepiece", "Mia has 7", "7", "9", "7", "9"),
            ("sentencepiece", "Mia has 7", "has", "sells", "Mia has ", "Mia sells "),
            ("sentencepiece", "Mia has 7", -1, "So ", "7", "So "),
            ("sentencepiece", "Ana 日", "日", "é", "日", "é"),
            ("wordpiece", "mia has pens.", "has", "sells", " has", " sells"),
            ("wordpiece", "mia has pens.", "has", "Sells", " has", " sells"),
            ("wordpiece", "mia has pens.", ".", "?", ".", "?"),
            ("wordpiece", "mia has monday.", "day", "dew", " monday", " mondew"),
            ("wordpiece", "mia has pensmon.", "m", "x", "m", "x"),
        ],
    )
    def test_texts_read_as_they_would_stand_there(
        self, kind, written, place, foil, target, text
    ):
        """With every kind of tokenizer; what one cannot write, it writes as it can."""
        tokenizer = tiny_tokenizer(kind)
        model = tiny_model(vocab_size=len(tokenizer))
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
        ids = tokenizer.encode(written, add_special_tokens=False)
        inp = TokenIdsInput(tokenizer.encode("Ana has"), tokenizer)
        (found,) = contrasts(task_of(llm_attr, inp, ids), {place: foil})
        assert (found.foil.target, found.foil.text) == (target, text)
        before = [*tokenizer.encode("Ana has"), *ids[: found.start]]
        ends = [tokenizer.decode([*before, *more]) for more in ([], list(found.ids))]
        assert ends[1] == ends[0] + text

    def test_a_piece_of_a_character_is_shown_by_the_character(self, model, tokenizer):
        """That it completes, with the pieces before it."""
        ids, other = tokenizer.encode(" So 😀."), tokenizer.encode(" So 😁.")
        (place,) = [i for i in range(len(ids)) if ids[i] != other[i]]
        assert place > 4
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
        task = task_of(llm_attr, TokenIdsInput([20, 21], tokenizer), ids)
        (contrast,) = contrasts(task, {place: other[place]})
        assert (contrast.foil.target, contrast.foil.text) == ("😀", "😁")
        assert contrasts(task, {"😀": "😁"})[0] == contrast

    def test_several_foils_come_in_reading_order(self, task):
        """Each of a unit of its own."""
        found = contrasts(task, {"7": "9", 0: 30, "pens": " texts"})
        assert [contrast.start for contrast in found] == [0, 4, 8]

    @pytest.mark.parametrize(
        ("foils", "error", "match"),
        [
            ({}, TypeError, "foil: must be a mapping from a place"),
            (None, TypeError, "foil: must be a mapping from a place"),
            ([("7", "9")], TypeError, "foil: must be a mapping .* but list"),
            (
                {"7": "7"},
                ValueError,
                "foil: must differ from what was written, but '7'",
            ),
            ({"7": [29]}, ValueError, "foil: must differ"),
            ({"pens": "pens"}, ValueError, "foil: must differ"),
            ({"7 pens": "7 pens"}, ValueError, "foil: must differ"),
            ({0: 9, -10: 8}, ValueError, "foil: a generated unit must have one foil"),
            ({"7": "9", 8: "8"}, ValueError, "'7' rather than '9' and '7' rather than"),
            (
                {"7 pens": 9, "pens": 9},
                ValueError,
                "must have one foil.* smaller units",
            ),
            ({"7": ""}, ValueError, "foil: must have a visible character, but '' came"),
            ({"7": " \n"}, ValueError, "foil: must have a visible character"),
            ({"7": []}, ValueError, "foil: must have a token, but it is empty"),
            ({"7": None}, TypeError, "foil: must be a sequence of token ids"),
            ({"7": 1.5}, TypeError, "foil: must be a sequence of token ids"),
            ({"7": True}, TypeError, "foil: must be a sequence of token ids"),
            ({"7": [True]}, TypeError, "foil: must be token ids"),
            ({"7": [[8], [9]]}, ValueError, "foil: must be the ids of one sequence"),
            ({"7": -1}, ValueError, "foil: cannot stand after .* vocabulary .* id -1"),
            ({"7": 10**6}, ValueError, "foil: cannot .* vocabulary .* id 1000000 came"),
            ({"7": [9] * 300}, ValueError, "foil: cannot stand .* context of 256 tok"),
        ],
    )
    def test_what_is_no_foil_is_refused(self, task, foils, error, match):
        """Before any model call, with what to do."""
        with pytest.raises(error, match=match):
            contrasts(task, foils)

    def test_a_unit_with_two_foils_is_refused(self, model, tokenizer):
        """Where two places stand in one larger unit."""
        cage = by_ablation(model, tokenizer)
        inp = TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)
        with pytest.raises(ValueError, match="foil: a generated unit must have one"):
            cage.attribute(inp, TARGET, units="sentence", foil={"pens": 9, "has": 8})
        found = cage.attribute(inp, TARGET, units="sentence", foil={"pens": 9, "7": 8})
        assert [foil.unit for foil in found.foils] == [0, 1]


# --- what is explained ---------------------------------------------------------------


class TestExplained:
    """Foils and ``explain=``."""

    @pytest.fixture
    def cage(self, model, tokenizer):
        """Ablation of the small model."""
        return by_ablation(model, tokenizer)

    @pytest.fixture
    def inp(self, tokenizer):
        """The prompt."""
        return TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)

    def test_the_units_with_foils_are_explained(self, cage, inp):
        """Unless more is asked for; then the others have their plain rows."""
        plain = cage.attribute(inp, TARGET).graph
        alone = cage.attribute(inp, TARGET, foil={"7": "9", "has": 9})
        assert alone.explained == (1, 8)
        more = cage.attribute(inp, TARGET, foil={"7": "9", "has": 9}, explain=(0, 9))
        assert more.explained == tuple(range(9))
        for result in (alone, more):
            assert [foil.unit for foil in result.foils] == [1, 8]
            assert result.graph.behind.steps.tolist() == [1, 8]
            assert_same(result.graph.behind.rows.toarray(), plain.rows[[1, 8]], 1e-12)
            others = [0, *range(2, 8), 9]
            assert_same(result.graph.rows[others], plain.rows[others], 1e-12)

    @pytest.mark.parametrize("explain", [0, (0, 8), "pens", -1])
    def test_others_alone_cannot_be_explained(self, cage, inp, explain):
        """A foil would change nothing."""
        with pytest.raises(ValueError, match="foil: must be about units that are expl"):
            cage.attribute(inp, TARGET, foil={8: 9}, explain=explain)

    def test_another_span_has_its_plain_explanation(self, cage, inp):
        """Foils stay where all of their units are explained."""
        plain = cage.attribute(inp, TARGET)
        result = cage.attribute(inp, TARGET, foil={3: 9, 8: 9})
        for span in (-1, "So", (0, 4), 8):
            other, expected = result.explaining(span), plain.explaining(span)
            assert other.foils == ()
            assert other.graph.behind is None
            assert_same(other.seq_attr, expected.seq_attr, 1e-12)
        again = result.explaining((2, 9))
        assert again.foils == result.foils
        assert again.graph is result.graph
        fresh = cage.attribute(inp, TARGET, foil={3: 9, 8: 9}, explain=(2, 9))
        assert_same(again.seq_attr, fresh.seq_attr, 1e-12)

    @pytest.mark.parametrize("normalization", ["positive", "absolute", "signed"])
    def test_paths_start_by_a_contrastive_row_and_go_on_by_plain_ones(
        self, model, tokenizer, inp, normalization
    ):
        """Two foils, the unit of one of which is passed by the other."""
        cage = by_ablation(model, tokenizer, normalization=normalization)
        plain = cage.attribute(inp, TARGET)
        # Both ways, so that a plain row differs from the contrastive one.
        result = cage.attribute(inp, TARGET, foil={"7": "9", 3: "9"})
        N, first = len(result.units), result.graph.n_sources
        starts = AttributionGraph.from_rows(result.graph.rows, first, normalization)
        starts, passing = starts.matrix.toarray(), plain.graph.matrix.toarray()

        def walk(unit, mass, row):
            if unit < first:
                arrived[unit] += mass
                return
            through[unit] += mass
            for before in range(unit):
                if row[unit, before]:
                    walk(before, mass * row[unit, before], passing)

        arrived, through = np.zeros(N), np.zeros(N)
        for unit in (first + 3, first + 8):
            walk(unit, 1.0, starts)
        assert through[first + 3] != 1.0  # it is passed, too
        assert np.abs(starts[first + 3] - passing[first + 3]).max() > 1e-3
        assert_same(result.seq_attr, arrived[:first])
        assert_same(result.step_attr, through[first:])
        direct = starts[[first + 3, first + 8], :first].sum(axis=0)
        assert_same(result.direct.seq_attr, direct)


# --- larger units, several tokens ----------------------------------------------------


class TestLargerUnits:
    """A place inside a unit, and foils of other lengths."""

    @pytest.mark.parametrize("strategy", ["loop", "fused"])
    @pytest.mark.parametrize("units", ["token", "word", "sentence"])
    @pytest.mark.parametrize(
        ("place", "foil"),
        [
            ("7", "9"),
            ("7", "4 more pens"),
            ("So 7", "Mia"),
            (" 7 pens", " three"),
            ("pens", "texts"),
        ],
    )
    def test_by_plain_passes(self, model, tokenizer, strategy, units, place, foil):
        """Each side by its own continuation; earlier tokens of the unit are fixed."""
        cage = by_ablation(model, tokenizer, generated_baseline=0)
        prompt, ids = tokenizer.encode(PROMPT), tokenizer.encode(TARGET)
        inp = TokenIdsInput(prompt, tokenizer)
        result = cage.attribute(
            inp, ids, units=units, foil={place: foil}, strategy=strategy
        )
        ((step, written, text),) = [(f.unit, f.target, f.text) for f in result.foils]
        (start, stop, other) = self.stretch(cage, inp, ids, units, place, foil)
        offsets = read(task_of(cage.llm_attr, inp, ids))
        assert "".join(offsets[start:stop]) == written
        assert tokenizer.decode(other) == text
        before = [*prompt, *ids[:start]]
        groups = self.groups(cage, inp, ids, units)
        expected = np.zeros(len(result.units))
        for unit in range(result.graph.n_sources + step):
            without = [
                0 if group == unit else token
                for token, group in zip(before, groups, strict=False)
            ]
            for sign, tokens in ((1, ids[start:stop]), (-1, other)):
                whole = log_probability(model, before, tokens)
                expected[unit] += sign * (
                    whole - log_probability(model, without, tokens)
                )
        # Captum adds the tokens of a unit in float32.
        assert_same(
            result.graph.rows[step], expected, 1e-9 if strategy == "fused" else 1e-5
        )

    @staticmethod
    def stretch(cage, inp, ids, units, place, foil):
        """First token of the stretch, the one after its last, and the foil's ids."""
        task = task_of(cage.llm_attr, inp, ids, units)
        (contrast,) = contrasts(task, {place: foil})
        return contrast.start, contrast.stop, list(contrast.ids)

    @staticmethod
    def groups(cage, inp, ids, units):
        """The unit of each token."""
        return task_of(cage.llm_attr, inp, ids, units).unit_of_token().tolist()

    @pytest.mark.parametrize("strategy", ["loop", "fused"])
    def test_gradients_of_a_whole_sentence(self, tokenizer, strategy):
        """Summed over the tokens of a side, and over the columns of each unit."""
        model = tiny_model("gpt2", vocab_size=len(tokenizer), dtype=torch.float64)
        method = LayerGradientXActivation(model, model.get_input_embeddings())
        cage = GraphContextAttribution(LLMGradientAttribution(method, tokenizer))
        prompt, ids = tokenizer.encode(PROMPT), tokenizer.encode(TARGET)
        inp = TokenIdsInput(prompt, tokenizer)
        result = cage.attribute(
            inp, ids, units="sentence", foil={"7": "4 more"}, strategy=strategy
        )
        start, stop, other = self.stretch(cage, inp, ids, "sentence", "7", "4 more")
        before = [*prompt, *ids[:start]]
        groups = self.groups(cage, inp, ids, "sentence")
        expected = np.zeros(len(result.units))
        table = model.get_input_embeddings().weight.detach()
        for sign, tokens in ((1, ids[start:stop]), (-1, other)):
            for number, token in enumerate(tokens):
                leaf = table[[*before, *tokens[:number]]].clone().requires_grad_()
                logs = model(inputs_embeds=leaf[None]).logits[0, -1].log_softmax(-1)
                (slope,) = torch.autograd.grad(logs[token], leaf)
                scores = (slope * leaf).sum(-1).detach().numpy()
                for place in range(len(before)):
                    if groups[place] < len(expected) - 1:
                        expected[groups[place]] += sign * scores[place]
        assert result.foils[0].unit == 1
        assert_same(result.graph.rows[1], expected)


# --- inputs --------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Ana has 3 pens.\nHow many?"}]


class TestInputs:
    """Foils after prompts of every kind."""

    def assert_is_difference(self, cage, inp, ids, place, foil, **more):
        """The row is that of two plain runs, whatever the prompt is."""
        result = cage.attribute(inp, ids, foil={place: foil}, **more)
        target = cage.attribute(inp, ids[: place + 1], **more).graph.rows[-1]
        other = cage.attribute(inp, [*ids[:place], foil], **more).graph.rows[-1]
        width = result.graph.n_sources + place
        assert_same(result.graph.rows[place, :width], (target - other)[:width], 1e-6)
        assert (result.graph.rows[place, width:] == 0).all()
        return result

    @pytest.mark.parametrize("strategy", ["loop", "auto"])
    @pytest.mark.parametrize(
        "make",
        [
            lambda t: TextTokenInput(PROMPT, t),
            lambda t: TextTokenInput(PROMPT, t, skip_tokens=t.encode(".")),
            lambda _: TextTemplateInput("{} has 3 {}.", ["Ana", "pens"]),
            lambda t: ChatTokenInput(MESSAGES, t),
        ],
        ids=["text", "some skipped", "template", "chat"],
    )
    def test_texts_templates_and_chats(self, model, tokenizer, make, strategy):
        """Whatever stands for an absent unit."""
        cage = by_ablation(model, tokenizer)
        ids = tokenizer.encode(TARGET)[:5]
        inp = make(tokenizer)
        self.assert_is_difference(cage, inp, ids, 3, 31, strategy=strategy)

    @pytest.mark.parametrize("strategy", ["loop", "auto"])
    def test_images(self, vision_model, tokenizer, strategy):
        """Halves of a picture for and against."""
        cage = by_ablation(vision_model, tokenizer)
        inp = image_input(tokenizer)
        result = self.assert_is_difference(
            cage, inp, [5, 9, 7], 1, 8, strategy=strategy
        )
        assert result.graph.n_sources == 2
        whole = cage.attribute(inp, [5, 9, 7], units="word", foil={0: [6, 8, 8]})
        assert whole.foils

    def test_a_remote_model_is_sent_both_texts(self, model, tokenizer):
        """And gives what the same model gives here."""
        provider = LocalProvider(model, tokenizer)
        method = FeatureAblation(RemoteLLMAttribution.placeholder_model)
        remote = RemoteLLMAttribution(method, tokenizer, provider)
        local = LLMAttribution(FeatureAblation(model), tokenizer)
        inp = TextTokenInput("Ana has 3 pens.", tokenizer)
        found, expected = (
            GraphContextAttribution(llm_attr).attribute(
                inp, " Mia has more pens.", units="word", foil={"more": "read the"}
            )
            for llm_attr in (remote, local)
        )
        assert found.foils == expected.foils
        assert_same(found.graph.rows, expected.graph.rows, 1e-5)

    def test_what_a_remote_model_reads_as_other_tokens_is_told(self, model, tokenizer):
        """A foil that is joined to what is before it; one that it cannot is refused."""
        provider = LocalProvider(model, tokenizer)
        method = FeatureAblation(RemoteLLMAttribution.placeholder_model)
        remote = RemoteLLMAttribution(method, tokenizer, provider)
        inp = TextTokenInput("Ana has 3 pens.", tokenizer)
        cage = GraphContextAttribution(remote)
        space, nine = tokenizer.encode(" ")[0], tokenizer.encode("9")[0]
        assert tokenizer.encode(" 9") != [space, nine]
        with pytest.warns(UserWarning, match="text of 1 of 6 rows as other tokens"):
            found = cage.attribute(inp, TARGET, units="word", foil={"7": "9"})
        assert found.foils[0].text == "9"
        provider.prompts.clear()
        with pytest.raises(ValueError, match="units: a remote model scores text, so"):
            cage.attribute(inp, TARGET, units="word", foil={2: [space, nine]})
        assert provider.prompts == []

    def test_traces(self, model, tokenizer):
        """In an early turn, whatever was said after it."""
        text = "Ana has 3 pens. Mia has 4. So Ana has 7. Mia has 3 more. How many? Ana."
        ids = tokenizer.encode(text)
        generated = np.zeros(len(ids), dtype=bool)
        generated[8:13] = generated[-3:] = True
        attributed = np.ones(len(ids), dtype=bool)
        attributed[[0, 14]] = False
        inp = TraceIdsInput(ids, tokenizer, generated, attributed)
        cage = by_ablation(model, tokenizer, generated_baseline=0)
        plain = cage.attribute(inp)
        for place, foil in ((2, 30), (6, 31)):
            result = cage.attribute(inp, foil={place: foil})
            unit = int(result.graph.generated_units[place])
            token = [i for i, a in enumerate(attributed) if a][unit]
            before = ids[:token]
            expected = np.zeros(len(result.units))
            for column, absent in enumerate(np.flatnonzero(attributed[:token])):
                without = [0 if i == absent else x for i, x in enumerate(before)]
                for sign, one in ((1, ids[token]), (-1, foil)):
                    brought = log_probability(model, before, [one])
                    brought -= log_probability(model, without, [one])
                    expected[column] += sign * brought
            assert_same(result.graph.rows[place], expected)
            others = [row for row in range(len(plain.output_tokens)) if row != place]
            assert_same(result.graph.rows[others], plain.graph.rows[others], 1e-12)
            assert result.foils[0].target == result.output_tokens[place]

    def test_a_text_of_two_turns_is_refused(self, model, tokenizer):
        """As part of it was not written."""
        ids = tokenizer.encode("Ana has 3 pens. Mia has 4. So Ana has 7.")
        generated = np.zeros(len(ids), dtype=bool)
        generated[5:7] = generated[-5:] = True
        inp = TraceIdsInput(ids, tokenizer, generated)
        cage = by_ablation(model, tokenizer)
        for key in ("Mia has 4. So Ana", re.compile("Mia.*")):
            with pytest.raises(ValueError, match="foil: a text must be what the model"):
                cage.attribute(inp, foil={key: "texts"})
        with pytest.raises(ValueError, match="foil: the text 'So' must be generated"):
            cage.attribute(inp, foil={"So": "First"})
        assert cage.attribute(inp, foil={"Mia has": "Ana"}).foils[0].unit == 0


# --- rows that are left out, and calls that are interrupted --------------------------


CUT = {"foil": {"7": "9", 3: "9"}, "explain": (2, 9)}


@pytest.fixture(scope="module")
def wholes(model, tokenizer):
    """The answer with nothing left out, in each normalization."""
    inp = TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)
    return {
        kind: by_gradients(model, tokenizer, normalization=kind).attribute(
            inp, TARGET, **CUT
        )
        for kind in ("positive", "absolute", "signed")
    }


class TestApproximations:
    """Certificates hold with foils, too."""

    @pytest.mark.parametrize("normalization", ["positive", "absolute", "signed"])
    @pytest.mark.parametrize(
        "approximation",
        [
            {"tolerance": 0.02},
            {"tolerance": 0.3},
            {"tolerance": 0.9},
            {"hops": 0},
            {"hops": 1},
            {"sparsify": 0.5},
            {"sparsify": 0.9, "tolerance": 0.2},
            {"tolerance": 0.2, "hops": 1},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("strategy", ["loop", "fused"])
    def test_what_is_left_open_bounds_the_error(
        self, model, tokenizer, wholes, approximation, normalization, strategy
    ):
        """And is no more than was allowed."""
        cage = by_gradients(model, tokenizer, normalization=normalization)
        inp = TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)
        whole = wholes[normalization]
        found = cage.attribute(inp, TARGET, strategy=strategy, **CUT, **approximation)
        missing = whole.seq_attr.numpy() - found.seq_attr.numpy()
        assert np.abs(missing).sum() <= found.unresolved + 1e-12
        if normalization != "signed":
            assert missing.min() >= -1e-12
            mass = float(found.seq_attr.sum()) + found.leaked + found.unresolved
            assert mass == pytest.approx(7, abs=1e-9)
        if set(approximation) == {"tolerance"}:
            assert found.unresolved <= approximation["tolerance"] * 7
        if approximation != {"tolerance": 0.02}:
            assert found.unresolved > 0 or strategy == "fused"
        # What a contrastive row says is never cut.
        assert_same(
            found.graph.rows[[3, 8]].toarray()
            if "sparsify" in approximation
            else found.graph.rows[[3, 8]],
            whole.graph.rows[[3, 8]],
        )

    def test_rows_behind_that_matter_little_are_not_computed(self, model, tokenizer):
        """A contrastive row leads to few others."""
        inp = TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)
        cage = by_gradients(model, tokenizer)
        found = cage.attribute(
            inp, TARGET, foil={"7": "9"}, tolerance=0.6, strategy="loop"
        )
        assert 1 <= found.rows_computed < 10
        assert 0 < found.unresolved <= 0.6
        assert found.graph.behind.kept.tolist() == [0.0]
        assert found.explaining(-1).unresolved == 1.0


class TestInterrupted:
    """The same call goes on where it stopped."""

    @pytest.fixture
    def interrupted(self):
        """Gradients that are interrupted in one of its calls."""

        class Interrupted(LayerGradientXActivation):
            capability = KNOWN["gradient-x-activation"][1]  # it is not random either
            calls, stop = 0, None

            def attribute(self, *args, **kwargs):
                type(self).calls += 1
                if type(self).calls == type(self).stop:
                    raise KeyboardInterrupt
                return super().attribute(*args, **kwargs)

        return Interrupted

    @pytest.mark.parametrize(
        ("stop", "tolerance", "kept"),
        [
            (4, 0.0, 3),  # in a plain row
            (11, 0.0, 10),  # in the first foil's
            (12, 0.0, 11),  # in the second's
            (2, 1e-9, 0),  # in the first foil's, where nothing else is known
            (3, 1e-9, 2),  # in the second's
            (8, 1e-9, 7),  # in a plain row after the contrastive ones
        ],
    )
    def test_finished_rows_are_not_computed_again(
        self, interrupted, model, tokenizer, stop, tolerance, kept
    ):
        """Neither the plain ones nor the contrastive ones."""
        inp = TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)
        arguments = {"foil": {3: 31, 8: 31}, "strategy": "loop"}
        arguments["tolerance"] = tolerance
        method = interrupted(model, model.get_input_embeddings())
        cage = GraphContextAttribution(LLMGradientAttribution(method, tokenizer))
        whole = cage.attribute(inp, TARGET, **arguments)
        all_calls, interrupted.calls, interrupted.stop = interrupted.calls, 0, stop
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, TARGET, **arguments)
        result = cage.attribute(inp, TARGET, **arguments)
        assert interrupted.calls - stop == all_calls - kept
        assert (result.graph.rows == whole.graph.rows).all()
        assert (result.seq_attr == whole.seq_attr).all()

    def test_another_foil_starts_afresh(self, interrupted, model, tokenizer):
        """Its contrastive row is another one."""
        inp = TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)
        interrupted.stop = 12
        method = interrupted(model, model.get_input_embeddings())
        cage = GraphContextAttribution(LLMGradientAttribution(method, tokenizer))
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, TARGET, foil={3: 31, 8: 31}, strategy="loop")
        found = cage.attribute(inp, TARGET, foil={3: 32, 8: 31}, strategy="loop")
        assert interrupted.calls == 12 + 12
        expected = by_gradients(model, tokenizer).attribute(
            inp, TARGET, foil={3: 32, 8: 31}, strategy="loop"
        )
        assert (found.graph.rows == expected.graph.rows).all()
