"""ReAGent and its one-shot variant, against plain passes of both models."""

from __future__ import annotations

import copy
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum.attr import (
    LLMAttribution,
    RemoteLLMAttribution,
    TextTemplateInput,
    TextTokenInput,
)
from tokenizers import AddedToken, processors
from torch import nn
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from captum_cage import ChatTokenInput, GraphContextAttribution, TokenIdsInput
from captum_cage.methods.reagent import OneShotReAGent, ReAGent, Stretch, refilled
from captum_cage.testing import check_engine
from tiny import (
    ARCHITECTURES,
    UNITS_AND_ARCHITECTURES,
    LocalProvider,
    tiny_model,
    tiny_tokenizer,
)

SHORT = "Ana has 3 pens."
LONGER = "Ana has 3 pens. Mia has 4 more."
KINDS = ("bert", "roberta")
both = pytest.mark.parametrize("method", [OneShotReAGent, ReAGent])
every_kind = pytest.mark.parametrize("kind", KINDS)


def masked_tokenizer(kind):
    """A tokenizer of a masked language model, with a vocabulary of its own."""
    tokenizer = copy.deepcopy(tiny_tokenizer("wordpiece" if kind == "bert" else "bpe"))
    first, last, mask = (
        ("[CLS]", "[SEP]", "[MASK]") if kind == "bert" else ("<s>", "</s>", "<mask>")
    )
    tokenizer.add_special_tokens(
        {
            "cls_token": first,
            "sep_token": last,
            "pad_token": "<pad>",
            # RoBERTa's mask takes the space in front of it.
            "mask_token": AddedToken(mask, lstrip=kind == "roberta", special=True),
        }
    )
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (first, last)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=ids
    )
    return tokenizer


@functools.lru_cache
def masked(kind, positions=130):
    """A small masked language model with random weights, and its tokenizer."""
    tokenizer = masked_tokenizer(kind)
    config, model = {
        "bert": (BertConfig, BertForMaskedLM),
        "roberta": (RobertaConfig, RobertaForMaskedLM),
    }[kind]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    network = model(
        config(
            vocab_size=len(tokenizer) + 3,  # rows that stand for no token
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=positions,
            pad_token_id=1,
        )
    ).eval()
    for parameter in network.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    torch.set_rng_state(state)
    return network, tokenizer


def made(method, model, tokenizer, kind="bert"):
    """A method with a small masked language model."""
    return method(model, *masked(kind), tokenizer)


def written(kind, before, old, after):
    """What is written between two texts: masks in a text, tokenised as a whole."""
    network, tokenizer = masked(kind)
    count = max(1, len(tokenizer.encode(old.strip(), add_special_tokens=False)))
    lead = old[: len(old) - len(old.lstrip())]
    text = before + lead + tokenizer.mask_token * count + after
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = network(ids).logits[0]
    found = []
    for place in (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]:
        ranked = logits[place].argsort(descending=True).tolist()
        found.append(
            next(
                i
                for i in ranked
                if i < len(tokenizer)
                and i not in tokenizer.all_special_ids
                and tokenizer.decode([i]).strip()
            )
        )
    assert len(found) == count
    start = tokenizer.decode(tokenizer.encode(before, add_special_tokens=False))
    both = tokenizer.decode(
        [*tokenizer.encode(before, add_special_tokens=False), *found]
    )
    trail = old[len(old.rstrip()) :] if old.strip() else ""
    return lead + both[len(start) :].strip() + trail


def log_probability(model, ids, targets):
    """Log-probability of targets after a text, by plain passes, one for each."""
    total = []
    for place, target in enumerate(targets):
        with torch.no_grad():
            read = torch.tensor([[*ids, *targets[:place]]])
            logs = model(read).logits[0, -1].double().log_softmax(dim=-1)
        total.append(float(logs[target]))
    return np.array(total)


def attributed(method, tokenizer, inp, target, **options):
    """What Captum's object gives without the graph, each target's row."""
    found = LLMAttribution(method, tokenizer).attribute(
        inp, target=torch.tensor(target), use_cached_outputs=False, **options
    )
    assert torch.allclose(found.seq_attr, found.token_attr.sum(dim=0), atol=1e-4)
    return found.token_attr.numpy()


@pytest.fixture(scope="module")
def target(tokenizer):
    """Ids of a generated text."""
    return tokenizer.encode(" Mia has 7. So")


class Always(nn.Module):
    """A masked language model that writes one token everywhere, and keeps its input."""

    device = torch.device("cpu")

    def __init__(self, token, size):
        super().__init__()
        self.token, self.size = token, size
        self.read = []

    def forward(self, input_ids, attention_mask=None):
        """Logits that are all for one token."""
        assert attention_mask.shape == input_ids.shape
        self.read.append(input_ids[0].tolist())
        logits = torch.zeros((*input_ids.shape, self.size))
        logits[..., self.token] = 9.0
        return SimpleNamespace(logits=logits)


def always(kind, text):
    """A model that writes one text everywhere, and its tokenizer."""
    tokenizer = masked_tokenizer(kind)
    (token,) = tokenizer.encode(text, add_special_tokens=False)
    return Always(token, len(tokenizer)), tokenizer


class TestRefill:
    """What a masked language model writes in a unit's place."""

    @every_kind
    @pytest.mark.parametrize("causal", ["bpe", "sentencepiece"])
    @pytest.mark.parametrize("span", [(0, 1), (1, 2), (2, 4), (3, 5), (0, 5)])
    def test_masks_get_their_most_probable_tokens(self, model, kind, causal, span):
        """As many as the unit's text has for that model; white space stays."""
        tokenizer = tiny_tokenizer(causal)
        ids = tokenizer.encode("Zoe is in; Tom writes 9.")
        start, stop = (end + (causal == "sentencepiece") for end in span)
        method = made(OneShotReAGent, model, tokenizer, kind)
        (found,) = method.refill(ids, np.arange(start, stop), len(ids))
        before, upto, whole = (tokenizer.decode(ids[:end]) for end in (start, stop, 99))
        old, after = upto[len(before) :], whole[len(upto) :]
        expected = before + written(kind, before, old, after)
        assert (found.start, found.stop) == (start, stop)
        assert tokenizer.decode([*ids[:start], *found.ids]) == expected

    @every_kind
    def test_parts_of_a_unit_are_masked_together(self, model, tokenizer, kind):
        """Each part gets what is written there."""
        network, other = always(kind, "pens")
        method = OneShotReAGent(model, network, other, tokenizer)
        ids = tokenizer.encode(SHORT)
        found = method.refill(ids, np.array([1, 3]), len(ids))
        assert [(one.start, one.stop) for one in found] == [(1, 2), (3, 4)]
        pieces = [tokenizer.decode([i]) for i in ids]
        counts = [
            len(other.encode(pieces[i].strip(), add_special_tokens=False))
            for i in (1, 3)
        ]
        join = "" if kind == "roberta" else " "
        pieces[1], pieces[3] = (" " + join.join(["pens"] * n) for n in counts)
        assert tokenizer.decode(refilled(ids, found)) == "".join(pieces)
        (read,) = network.read
        assert read.count(other.mask_token_id) == sum(counts)

    def test_a_text_that_stays_keeps_its_ids(self, model, tokenizer):
        """Though it would be tokenised in another way."""
        network, other = always("bert", "pens")
        method = OneShotReAGent(model, network, other, tokenizer)
        ids = [*tokenizer.encode("Ana has"), *(tokenizer.encode(c) for c in " pens")]
        ids = [i if isinstance(i, int) else i[0] for i in ids]
        assert tokenizer.encode(tokenizer.decode(ids)) != ids
        tokens = np.arange(len(ids) - 5, len(ids))
        assert len(other.encode("pens", add_special_tokens=False)) == 1
        assert refilled(ids, method.refill(ids, tokens, len(ids))) == ids

    def test_white_space_alone_is_written_after(self, model, tokenizer):
        """A unit without visible text gets one token."""
        network, other = always("bert", "pens")
        method = OneShotReAGent(model, network, other, tokenizer)
        ids = tokenizer.encode("Ana\nhas")
        place = ids.index(tokenizer.encode("\n")[0])
        found = method.refill(ids, np.array([place]), len(ids))
        assert tokenizer.decode(refilled(ids, found)) == "Ana\npenshas"

    def test_special_tokens_are_not_written(self, model, tokenizer, monkeypatch):
        """Nor rows of the output layer that stand for no token."""
        other = masked_tokenizer("bert")
        decode = other.decode

        def strict(ids, **options):
            if max(ids, default=0) >= len(other):
                raise IndexError("no such token")
            return decode(ids, **options)

        monkeypatch.setattr(other, "decode", strict)
        ranked = [len(other) + 1, other.mask_token_id, other.sep_token_id]
        network = Always(0, len(other) + 2)
        pens = other.convert_tokens_to_ids("pens")
        forward = network.forward

        def ordered(**inputs):
            out = forward(**inputs)
            for rank, token in enumerate([*ranked, pens]):
                out.logits[..., token] = 20.0 - rank
            return out

        network.forward = ordered
        method = OneShotReAGent(model, network, other, tokenizer)
        ids = tokenizer.encode(SHORT)
        found = method.refill(ids, np.array([1]), len(ids))
        assert tokenizer.decode(refilled(ids, found)) == "Ana pens 3 pens."

    def test_what_it_reads_ends_with_the_prompt_or_the_unit(self, model, tokenizer):
        """A source unit's refill sees the prompt, a generated one's what it ends."""
        network, other = always("bert", "pens")
        method = OneShotReAGent(model, network, other, tokenizer)
        prompt, generated = tokenizer.encode(SHORT), tokenizer.encode(" Mia has 4.")
        ids, P = [*prompt, *generated], len(prompt)
        for unit in range(len(ids)):
            method.refill(ids, np.array([unit]), P)
        for unit, read in enumerate(network.read):
            text = other.decode(read).replace(" ", "")
            end = P if unit < P else unit + 1
            pieces = [tokenizer.decode([i]).strip().lower() for i in ids[:end]]
            old = pieces[unit]
            pieces[unit] = "[MASK]" * len(other.encode(old, add_special_tokens=False))
            assert text == "".join(["[CLS]", *pieces, "[SEP]"])

    @pytest.mark.parametrize("position", [0, 20, 39])
    @every_kind
    def test_a_long_text_is_read_around_the_unit(
        self, model, tokenizer, kind, position
    ):
        """As much as the masked language model can read."""
        network, other = masked(kind, 18)
        lengths = []
        forward = type(network).forward

        def recorded(self, **inputs):
            lengths.append(inputs["input_ids"].shape[1])
            assert other.mask_token_id in inputs["input_ids"]
            return forward(self, **inputs)

        ids = tokenizer.encode("Ana has 3 pens. " * 8)[:40]
        method = OneShotReAGent(model, network, other, tokenizer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(network), "forward", recorded)
            method.refill(ids, np.array([position]), len(ids))
            method.refill(ids, np.array([0, 39]), len(ids))
        assert lengths == [16, 16, 16]

    def test_a_unit_that_is_too_long_is_refused(self, model, tokenizer):
        """It cannot be masked as a whole."""
        method = OneShotReAGent(model, *masked("bert", 18), tokenizer)
        ids = tokenizer.encode("Ana has 3 pens. " * 8)
        with pytest.raises(ValueError, match="masked_lm: must write all tokens of a"):
            method.refill(ids, np.arange(30), len(ids))

    def test_the_masked_model_is_left_as_it_was(self, model, tokenizer):
        """Dropout is off while it writes, and on again where it was on."""
        network, other = masked("bert")
        network = copy.deepcopy(network).train()
        network.cls.eval()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.9
        before = [module.training for module in network.modules()]
        method = OneShotReAGent(model, network, other, tokenizer)
        ids = tokenizer.encode(SHORT)
        found = method.refill(ids, np.arange(3), len(ids))
        assert [module.training for module in network.modules()] == before
        plain = made(OneShotReAGent, model, tokenizer)
        assert found == plain.refill(ids, np.arange(3), len(ids))

    def test_stretches_are_put_in_order(self):
        """Longer and shorter ones."""
        stretches = [Stretch(3, 4, (9, 9)), Stretch(0, 2, ())]
        assert refilled([1, 2, 3, 4, 5], stretches) == [3, 9, 9, 5]


class TestOneShotReAGent:
    """Log-probability lost by a refill."""

    @every_kind
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_scores_are_what_a_refill_loses(self, tokenizer, target, arch, kind):
        """For each target, by plain passes over the text with other ids in it."""
        model = tiny_model(arch, vocab_size=len(tokenizer))
        method = made(OneShotReAGent, model, tokenizer, kind)
        ids = tokenizer.encode(SHORT)
        found = attributed(method, tokenizer, TokenIdsInput(ids, tokenizer), target)
        plain = log_probability(model, ids, target)
        for unit in range(len(ids)):
            (new,) = method.refill(ids, np.array([unit]), len(ids))
            changed = [*ids[:unit], *new.ids, *ids[unit + 1 :]]
            expected = plain - log_probability(model, changed, target)
            np.testing.assert_allclose(found[:, unit], expected, atol=2e-5)
        assert np.abs(found).max() > 0.1

    def test_a_unit_that_is_written_again_gets_nothing(self, model, tokenizer, target):
        """Exactly 0, by the loop and by the engine."""
        network, other = always("bert", "pens")
        method = OneShotReAGent(model, network, other, tokenizer)
        cage = GraphContextAttribution(LLMAttribution(method, tokenizer))
        inp = TextTokenInput("Ana has 3 pens", tokenizer)
        for strategy in ("loop", "fused"):
            rows = cage.attribute(inp, target, strategy=strategy).graph.rows
            assert (rows[:, 3] == 0).all()
            assert (rows[:, 0] != 0).all()

    @pytest.mark.parametrize(
        ("units", "arch", "kind"),
        [
            *((*both, KINDS[0]) for both in UNITS_AND_ARCHITECTURES),
            *((units, "llama", KINDS[1]) for units in ("token", "word", "sentence")),
        ],
    )
    def test_the_engine_gives_the_loop_s_rows(
        self, tokenizer, target, arch, units, kind
    ):
        """To 1e-5 of the largest entry."""
        model = tiny_model(arch, vocab_size=len(tokenizer))
        llm_attr = LLMAttribution(
            made(OneShotReAGent, model, tokenizer, kind), tokenizer
        )
        check_engine(llm_attr, TextTokenInput(LONGER, tokenizer), target, units=units)

    @pytest.mark.parametrize("causal", ["bpe", "sentencepiece", "wordpiece"])
    @pytest.mark.parametrize("units", ["token", "word"])
    def test_of_every_tokenizer_in_double_precision(self, causal, units):
        """To 1e-10."""
        tokenizer = tiny_tokenizer(causal)
        model = tiny_model("llama", vocab_size=len(tokenizer), dtype=torch.float64)
        llm_attr = LLMAttribution(made(OneShotReAGent, model, tokenizer), tokenizer)
        target = tokenizer.encode(" Mia has 7. So", add_special_tokens=False)
        inp = TextTokenInput(LONGER, tokenizer)
        check_engine(llm_attr, inp, target, units=units)

    @pytest.mark.parametrize("text", ["Ana 😀 has 日本.", " \n\n Ana\thas  3"])
    def test_of_texts_with_pieces_of_characters(self, model, tokenizer, text):
        """And with white space of all kinds, in the prompt and after it."""
        llm_attr = LLMAttribution(made(OneShotReAGent, model, tokenizer), tokenizer)
        inp = TextTokenInput(text, tokenizer)
        target = tokenizer.encode(text)
        check_engine(llm_attr, inp, target)
        check_engine(llm_attr, inp, target, units="word")

    def test_of_groups_and_chats(self, model, tokenizer, target):
        """Fixed tokens are read by both models; groups may lie apart."""
        llm_attr = LLMAttribution(made(OneShotReAGent, model, tokenizer), tokenizer)
        ids = tokenizer.encode(LONGER)
        groups = [[-1, 0, 1, 1, 0][i % 5] for i in range(len(ids))]
        inp = TokenIdsInput(ids, tokenizer, feature_mask=groups)
        check_engine(llm_attr, inp, target)
        messages = [{"role": "user", "content": SHORT}]
        check_engine(llm_attr, ChatTokenInput(messages, tokenizer), target)

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_of_any_batch_size(self, model, tokenizer, target, batch_size):
        """Texts of different lengths share a pass."""
        llm_attr = LLMAttribution(made(OneShotReAGent, model, tokenizer), tokenizer)
        inp = TextTokenInput(LONGER, tokenizer)
        check_engine(llm_attr, inp, target, units="word", batch_size=batch_size)

    def test_memory_that_runs_out_halves_the_batch(
        self, model, tokenizer, target, monkeypatch
    ):
        """The rows are the same."""
        sizes = []
        forward = type(model).forward

        @functools.wraps(forward)
        def limited(self, *args, **kwargs):
            sizes.append(len(kwargs["input_ids"]))
            if sizes[-1] > 2:
                raise RuntimeError("CUDA out of memory.")
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", limited)
        llm_attr = LLMAttribution(made(OneShotReAGent, model, tokenizer), tokenizer)
        check_engine(llm_attr, TextTokenInput(LONGER, tokenizer), target, units="word")
        assert max(sizes) > 2

    def test_of_a_model_without_keys_and_values(self, model, tokenizer, target):
        """Whole texts are read."""

        class Uncached(nn.Module):
            device = torch.device("cpu")

            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, input_ids, attention_mask=None):
                return self.inner(input_ids=input_ids, attention_mask=attention_mask)

        method = made(OneShotReAGent, Uncached().eval(), tokenizer)
        inp = TextTokenInput(LONGER, tokenizer)
        check_engine(LLMAttribution(method, tokenizer), inp, target, units="word")

    def test_of_a_model_that_takes_some_prefixes_only(
        self, tokenizer, target, monkeypatch
    ):
        """Where a pass from a prefix fails, texts are read from their beginning."""
        fussy = tiny_model("llama", vocab_size=len(tokenizer))
        failed = []
        plain = fussy.forward

        def forward(*args, past_key_values=None, **kwargs):
            length = 0 if past_key_values is None else past_key_values.get_seq_length()
            if 0 < length < 8:
                failed.append(length)
                raise RuntimeError("sizes do not match")
            return plain(*args, past_key_values=past_key_values, **kwargs)

        monkeypatch.setattr(fussy, "forward", forward)
        llm_attr = LLMAttribution(made(OneShotReAGent, fussy, tokenizer), tokenizer)
        inp = TokenIdsInput(tokenizer.encode(LONGER), tokenizer)
        check_engine(llm_attr, inp, target, batch_size=1)
        assert len(failed) == 1

    def test_texts_that_stay_are_not_scored_again(self, model, tokenizer, monkeypatch):
        """One pass is enough where every refill is its unit's own text."""
        passes = []
        forward = type(model).forward

        @functools.wraps(forward)
        def recorded(self, *args, **kwargs):
            passes.append(1)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", recorded)
        network, other = always("bert", "pens")
        method = OneShotReAGent(model, network, other, tokenizer)
        cage = GraphContextAttribution(LLMAttribution(method, tokenizer))
        inp = TextTokenInput(" pens pens pens", tokenizer)
        for _ in range(2):  # the first call looks at the model, too
            passes.clear()
            result = cage.attribute(inp, " pens pens", strategy="fused")
        assert len(passes) == 1
        assert (result.graph.rows == 0).all()

    def test_a_unit_is_written_once_for_all_rows(self, model, tokenizer, target):
        """By the engine; the loop asks for each row."""
        network, other = always("bert", "pens")
        method = OneShotReAGent(model, network, other, tokenizer)
        cage = GraphContextAttribution(LLMAttribution(method, tokenizer))
        result = cage.attribute(TextTokenInput(SHORT, tokenizer), target)
        assert len(network.read) == len(result.units) - 1

    def test_a_repeated_call_goes_on_from_what_was_finished(
        self, model, tokenizer, target, monkeypatch
    ):
        """After an interrupt, few passes are made twice."""
        passes, stop = [], [None]
        forward = type(model).forward

        @functools.wraps(forward)
        def recorded(self, *args, **kwargs):
            passes.append(1)
            if len(passes) == stop[0]:
                raise KeyboardInterrupt
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", recorded)
        llm_attr = LLMAttribution(made(OneShotReAGent, model, tokenizer), tokenizer)
        cage = GraphContextAttribution(llm_attr)
        inp = TextTokenInput(LONGER, tokenizer)
        arguments = {"strategy": "fused", "batch_size": 1}
        expected = cage.attribute(inp, target, **arguments).graph.rows
        whole = len(passes)
        passes.clear()
        stop[0] = whole * 2 // 3
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, target, **arguments)
        found = cage.attribute(inp, target, **arguments).graph.rows
        assert len(passes) <= whole + 4
        np.testing.assert_allclose(found, expected, atol=1e-5)


def recursion(model, method, ids, target, seed, *, ratio, kept, candidates, steps):
    """Algorithm 1 with plain passes, and the number of steps that it took."""
    refills = [
        method.refill(ids, np.array([i]), len(ids))[0].ids for i in range(len(ids))
    ]

    def predicted(replaced):
        read = []
        for place, token in enumerate(ids):
            read.extend(refills[place] if replaced[place] else [token])
        with torch.no_grad():
            logits = model(torch.tensor([read])).logits[0, -1].double()
        probabilities = logits.softmax(dim=-1).tolist()
        rank = sorted(probabilities, reverse=True).index(probabilities[target])
        return probabilities[target], rank

    torch.manual_seed(seed)
    scores = torch.rand(len(ids), dtype=torch.float64).numpy()
    plain, _ = predicted([False] * len(ids))
    taken = 0
    while taken < steps:
        taken += 1
        replaced = (torch.rand(len(ids)) < ratio).tolist()
        change = plain - predicted(replaced)[0]
        for unit in range(len(ids)):
            delta = change if replaced[unit] else -change
            scaled = delta * 0.5 + 0.5
            scores[unit] += math.log(scaled / (1 - scaled))
        best = np.argsort(-scores)[:kept]
        if predicted([unit not in best for unit in range(len(ids))])[1] < candidates:
            break
    weights = np.exp(scores - scores.max())
    return weights / weights.sum(), taken


class TestReAGent:
    """The recursion."""

    @pytest.mark.parametrize(
        ("arch", "kind"),
        [*((arch, KINDS[0]) for arch in ARCHITECTURES), ("llama", KINDS[1])],
    )
    def test_it_is_the_algorithm(self, tokenizer, arch, kind):
        """The same draws give the same importance after the same steps."""
        model = tiny_model(arch, vocab_size=len(tokenizer))
        method = made(ReAGent, model, tokenizer, kind)
        ids = tokenizer.encode(LONGER)
        with torch.no_grad():
            order = model(torch.tensor([ids])).logits[0, -1].argsort(descending=True)
        best = [int(i) for i in order if tokenizer.decode([int(i)]).isascii()]
        inp = TokenIdsInput(ids, tokenizer)
        taken = set()
        for token in (best[0], best[20], best[60]):
            for seed in range(3):
                torch.manual_seed(seed)
                (found,) = attributed(
                    method,
                    tokenizer,
                    inp,
                    [token],
                    replacing_ratio=0.4,
                    keep_top_n=len(ids) - 1,
                    rational_candidates=80,
                    max_steps=12,
                )
                expected, steps = recursion(
                    model,
                    method,
                    ids,
                    token,
                    seed,
                    ratio=0.4,
                    kept=len(ids) - 1,
                    candidates=80,
                    steps=12,
                )
                taken.add(steps)
                np.testing.assert_allclose(found, expected, atol=1e-4)
        assert len(taken) > 1

    def test_the_units_that_stay_may_be_a_share(self, model, tokenizer):
        """Rounded up, in place of their number."""
        method = made(ReAGent, model, tokenizer)
        ids = tokenizer.encode(LONGER)
        with torch.no_grad():
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())

        def rows(**more):
            found = []
            for seed in range(24):  # enough that one more unit changes a stop
                torch.manual_seed(seed)
                recursion = {"max_steps": 6, "rational_candidates": 1, **more}
                found.append(
                    method.effects(
                        ids, np.arange(len(ids)), torch.tensor([best]), **recursion
                    )
                )
            return torch.cat(found)

        found = rows(keep_ratio=(len(ids) - 2.5) / len(ids))
        assert torch.equal(found, rows(keep_top_n=len(ids) - 2))
        assert not torch.equal(found, rows(keep_top_n=len(ids) - 3))

    @pytest.mark.parametrize("units", ["token", "word"])
    def test_each_target_brings_a_mass_of_one(self, model, tokenizer, target, units):
        """A unit's row is the sum over its tokens; the loop computes it."""
        llm_attr = LLMAttribution(made(ReAGent, model, tokenizer), tokenizer)
        result = GraphContextAttribution(llm_attr).attribute(
            TextTokenInput(SHORT, tokenizer), target, units=units, max_steps=3
        )
        assert result.meta["strategy"] == "loop"
        tokens = [1] * 6 if units == "token" else [1, 1, 2, 1]
        sums = result.graph.rows.sum(axis=1)
        assert len(sums) <= len(tokens)
        assert sums.sum() == pytest.approx(len(target))
        assert (result.graph.rows >= 0).all()

    def test_what_the_target_needs_is_found(self, tokenizer):
        """A model that says 9 if and only if it has read 'pens'."""
        (pens,) = tokenizer.encode(" pens")
        size = len(tokenizer)

        class Needing(nn.Module):
            device = torch.device("cpu")

            def forward(self, input_ids, attention_mask=None):
                del attention_mask
                logits = torch.zeros((*input_ids.shape, size))
                seen = (input_ids == pens).cumsum(dim=1) > 0
                logits[..., 9] = torch.where(seen, 4.0, -4.0)
                return SimpleNamespace(logits=logits)

        network, other = always("bert", "has")
        method = ReAGent(Needing(), network, other, tokenizer)
        inp = TextTokenInput(LONGER, tokenizer)
        place = tokenizer.encode(LONGER).index(pens)
        torch.manual_seed(0)
        (row,) = attributed(
            method, tokenizer, inp, [9], keep_top_n=1, rational_candidates=1
        )
        assert row.argmax() == place

    def test_a_change_of_one_is_finite(self, tokenizer):
        """From probability 1 to 0."""
        (pens,) = tokenizer.encode(" pens")
        size = len(tokenizer)

        class Certain(nn.Module):
            device = torch.device("cpu")

            def forward(self, input_ids, attention_mask=None):
                del attention_mask
                logits = torch.zeros((*input_ids.shape, size), dtype=torch.float64)
                seen = (input_ids == pens).cumsum(dim=1) > 0
                logits[..., 9] = torch.where(seen, 1e4, -1e4)
                return SimpleNamespace(logits=logits)

        network, other = always("bert", "has")
        method = ReAGent(Certain(), network, other, tokenizer)
        inp = TextTokenInput(LONGER, tokenizer)
        (row,) = attributed(method, tokenizer, inp, [9], keep_top_n=0, max_steps=20)
        assert np.isfinite(row).all()

    def test_the_user_seeds_it(self, model, tokenizer, target):
        """By torch's generator."""
        llm_attr = LLMAttribution(made(ReAGent, model, tokenizer), tokenizer)
        cage = GraphContextAttribution(llm_attr)
        rows = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            result = cage.attribute(
                TextTokenInput(SHORT, tokenizer), target, max_steps=3
            )
            rows.append(result.graph.rows)
        assert (rows[0] == rows[1]).all()
        assert (rows[0] != rows[2]).any()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"replacing_ratio": 0}, "replacing_ratio: must be a share"),
            ({"replacing_ratio": 1}, "replacing_ratio: must be a share"),
            ({"replacing_ratio": True}, "replacing_ratio: must be a share"),
            ({"replacing_ratio": "0.3"}, "replacing_ratio: must be a share"),
            ({"keep_ratio": 1.5}, "keep_ratio: must be a share"),
            ({"keep_top_n": -1}, "keep_top_n: must be 0 or more"),
            ({"keep_top_n": 1.5}, "keep_top_n: must be a whole number"),
            ({"rational_candidates": 0}, "rational_candidates: must be 1 or more"),
            ({"max_steps": 0}, "max_steps: must be 1 or more"),
        ],
    )
    def test_arguments_are_checked(self, model, tokenizer, options, message):
        """Each has its own error."""
        method = made(ReAGent, model, tokenizer)
        inp = TextTokenInput(SHORT, tokenizer)
        with pytest.raises((TypeError, ValueError), match=message):
            attributed(method, tokenizer, inp, [9], **options)


class TestErrors:
    """What cannot be done is refused."""

    @both
    def test_models_and_tokenizers_are_needed(self, model, tokenizer, method):
        """Each error names what is missing."""
        network, other = masked("bert")
        with pytest.raises(TypeError, match="reads the inside of a PyTorch model"):
            method(None, network, other, tokenizer)
        with pytest.raises(TypeError, match="masked_lm: must be a masked language"):
            method(model, "roberta-base", other, tokenizer)
        with pytest.raises(TypeError, match="masked_tokenizer: must be a tokenizer"):
            method(model, network, None, tokenizer)
        with pytest.raises(TypeError, match="tokenizer: must be a tokenizer"):
            method(model, network, other, None)
        with pytest.raises(ValueError, match="masked_tokenizer: must have a mask"):
            method(model, network, tokenizer, tokenizer)

    @both
    def test_templates_and_remote_models_are_refused(self, model, tokenizer, method):
        """Tokens must be known, and the model at hand."""
        template = TextTemplateInput("{} has.", ["Ana"])
        base = made(method, model, tokenizer)
        cage = GraphContextAttribution(LLMAttribution(base, tokenizer))
        with pytest.raises(TypeError, match=r"inp: .* needs a TextTokenInput"):
            cage.attribute(template, [9])
        with pytest.raises(TypeError, match="its features must be tokens"):
            attributed(base, tokenizer, template, [9])
        provider = LocalProvider(model, tokenizer)
        remote = RemoteLLMAttribution(base, tokenizer, provider)
        with pytest.raises(TypeError, match="needs the model itself"):
            GraphContextAttribution(remote).attribute(
                TextTokenInput(SHORT, tokenizer), " Mia"
            )

    @both
    def test_probabilities_are_refused(self, model, tokenizer, method):
        """What is attributed is fixed."""
        llm_attr = LLMAttribution(
            made(method, model, tokenizer), tokenizer, attr_target="prob"
        )
        with pytest.raises(ValueError, match="attr_target: must be 'log_prob'"):
            GraphContextAttribution(llm_attr).attribute(
                TextTokenInput(SHORT, tokenizer), [9]
            )
