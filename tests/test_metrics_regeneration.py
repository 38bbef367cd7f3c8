"""Texts written again, against the same written token by token."""

from __future__ import annotations

import copy
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    RemoteLLMAttribution,
    TextTemplateInput,
)
from torch import nn
from transformers import LogitsProcessor, StoppingCriteria

from captum_cage import ChatTokenInput, ChatTraceInput, TokenIdsInput, TraceIdsInput
from captum_cage.demo.planted import planted_cases, planted_model
from captum_cage.metrics.regeneration import Regenerator, Sampling
from captum_cage.metrics.removal import MaskedRefill, Remover
from test_methods_reagent import masked
from test_metrics_removal import BASELINE, LATER, case_of, sets
from tiny import (
    ARCHITECTURES,
    LocalProvider,
    image_input,
    task_of,
    tiny_model,
    tiny_tokenizer,
)

WINDOW = 16  # of gemma3 in tiny.py
END = "<|end|>"
REMOVALS = ("delete", "baseline", "suppress")
SHORT = {"max_new_tokens": 5}
GREEDY = Sampling()
every_removal = pytest.mark.parametrize("removal", REMOVALS)
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def small(arch="llama", **changes):
    """A small model in which rounding decides nothing."""
    size = len(tiny_tokenizer())
    return tiny_model(arch, vocab_size=size, dtype=torch.float64, **changes)


def regenerator(
    model, case, removal="delete", sampling=GREEDY, gen_args=SHORT, last=None, **more
):
    """What writes a case again; its sources are words."""
    units = more.pop("units", "word")
    llm_attr = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    task = task_of(llm_attr, case.inp, case.generated, units, LATER)
    remover = Remover(task, removal)
    last = len(remover.written) - 1 if last is None else last
    return Regenerator(remover, last, sampling, gen_args, **more)


def masks(ids, hidden, window=None):
    """Which tokens each token sees, to be added to its scores."""
    mask = torch.full((1, 1, len(ids), len(ids)), -1e9, dtype=torch.float64)
    for query in range(len(ids)):
        for key in range(query + 1):
            near = window is None or query - key < window
            if near and (hidden[query] or not hidden[key]):
                mask[0, 0, query, key] = 0.0
    return mask


def logits_after(model, ids, hidden):
    """Logits of what follows some ids, by one pass over all of them."""
    arguments = {}
    if any(hidden):
        mask = masks(ids, hidden)
        if model.config.model_type == "gemma3_text":
            near = masks(ids, hidden, WINDOW)
            mask = {"full_attention": mask, "sliding_attention": near}
        arguments["attention_mask"] = mask
    with torch.no_grad():
        return model(torch.tensor([ids]), **arguments).logits[0, -1]


def turns_of(written):
    """Ranges of what the model wrote."""
    found, place = [], 0
    for wrote, same in groupby(written):
        size = len(list(same))
        if wrote:
            found.append((place, place + size))
        place += size
    return found


def by_hand(model, case, removal, kept, most=None, ends=(), turns=None):
    """What stands before the last turn, which of it is hidden, and that turn."""
    ids, hidden, place = [], [], 0
    for start, stop in turns or turns_of(case.written):
        for outside in range(place, start):
            source = case.source[outside]
            gone = source >= 0 and not kept[source]
            if gone and removal == "delete":
                continue
            token = case.ids[outside]
            if gone and removal == "baseline":
                token = BASELINE if outside < case.prompt else LATER
            ids.append(token)
            hidden.append(gone and removal == "suppress")
        if not ids:
            ids, hidden = [BASELINE], [False]
        before = (tuple(ids), tuple(hidden))
        turn = []
        while len(turn) < (most or 2 * (stop - start) + 16):
            token = int(logits_after(model, ids, hidden).argmax())
            if token in ends:
                break
            turn.append(token)
            ids.append(token)
            hidden.append(False)
        place = stop
    return *before, tuple(turn)


class TestGreedily:
    """One text for each set of sources, always the likeliest token."""

    @every_removal
    @every_architecture
    @pytest.mark.parametrize("name", ["text", "chat trace"])
    def test_batches_say_what_single_passes_say(self, arch, removal, name):
        """Whatever the architecture, how sources are taken away, and the input."""
        model = small(arch)
        case = case_of(name, "word")
        kept = np.array(sets(max(case.source) + 1))[:4]
        found = regenerator(model, case, removal).drafts(kept)
        for one, (written,) in zip(kept, found, strict=True):
            expected = by_hand(model, case, removal, one, most=5)
            assert (written.before, written.hidden, written.turn) == expected
            assert written.model_input is None
        assert len({written.turn for (written,) in found}) > 1

    def test_it_is_what_the_model_generates(self, model):
        """By its own method, one text at a time."""
        case = case_of("text", "word")
        kept = np.array(sets(max(case.source) + 1))
        found = regenerator(model, case, gen_args={"max_new_tokens": 30}).drafts(kept)
        for (written,) in found:
            ids = torch.tensor([written.before])
            expected = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=30,
                do_sample=False,
            )
            assert list(written.turn) == expected[0, ids.shape[1] :].tolist()

    @pytest.mark.parametrize("batch_size", [1, 2, 7])
    def test_the_batch_changes_nothing(self, batch_size):
        """Texts are the same, in the order of the sets."""
        model, case = small(), case_of("trace", "word")
        kept = np.array(sets(max(case.source) + 1))
        expected = regenerator(model, case).drafts(kept)
        found = regenerator(model, case, batch_size=batch_size).drafts(kept[::-1])
        assert found == expected[::-1]

    @pytest.mark.parametrize("minds", [False, True])
    def test_shorter_texts_are_filled_up_where_the_model_does_not_mind(
        self, monkeypatch, minds
    ):
        """One call for all lengths, else one for each; the texts are the same."""
        model, case = small(), case_of("text", "word")
        kept = np.array(sets(max(case.source) + 1))
        alone = regenerator(model, case, batch_size=1).drafts(kept)
        lengths = {len(written.before) for (written,) in alone}
        generate, forward = model.generate, model.forward
        asked = []

        def counted(**arguments):
            if "output_logits" not in arguments:  # which looks whether it minds
                asked.append(len(arguments["input_ids"]))
            return generate(**arguments)

        def minding(*args, **arguments):
            mask = arguments.get("attention_mask")
            found = forward(*args, **arguments)
            if mask is not None and mask.dim() == 2 and not mask.all():
                found.logits += torch.arange(found.logits.shape[-1])
            return found

        if minds:
            monkeypatch.setattr(model, "forward", minding)
        monkeypatch.setattr(model, "generate", counted)
        assert regenerator(model, case).drafts(kept) == alone
        assert len(lengths) > 1
        assert len(asked) == (len(lengths) if minds else 1)

    @every_architecture
    def test_hidden_tokens_stay_hidden_when_the_window_has_moved_on(self, arch):
        """More is written than a layer with a window remembers."""
        model, case = small(arch), case_of("text", "word")
        count = max(case.source) + 1
        kept = np.array([np.arange(count) < count - 3, np.arange(count) % 2 == 0])
        most = WINDOW + 4
        writer = regenerator(model, case, "suppress", gen_args={"max_new_tokens": most})
        for one, (written,) in zip(kept, writer.drafts(kept), strict=True):
            expected = by_hand(model, case, "suppress", one, most)
            assert (written.before, written.hidden, written.turn) == expected

    @pytest.mark.parametrize("name", ["trace", "chat trace"])
    def test_the_turn_that_is_asked_for_is_the_last_one_written(self, name):
        """Later ones do not matter to it."""
        model, case = small(), case_of(name, "word")
        turns = turns_of(case.written)
        assert len(turns) == 2
        kept = np.array(sets(max(case.source) + 1))[:3]
        for number, (start, stop) in enumerate(turns):
            for last in (start, stop - 1):
                found = regenerator(model, case, last=last).drafts(kept)
                for one, (written,) in zip(kept, found, strict=True):
                    expected = by_hand(
                        model, case, "delete", one, 5, turns=turns[: number + 1]
                    )
                    assert (written.before, written.turn) == expected[::2]

    def test_a_turn_may_become_about_twice_as_long(self):
        """And sixteen tokens, unless it is said how long."""
        model, case = small(), case_of("trace", "sentence")
        kept = np.array(sets(max(case.source) + 1))[:2]
        found = regenerator(model, case, gen_args=None, units="sentence").drafts(kept)
        for one, (written,) in zip(kept, found, strict=True):
            expected = by_hand(model, case, "delete", one)
            assert (written.before, written.turn) == expected[::2]

    def test_what_a_masked_model_wrote_stands_between_the_turns(self):
        """All of it, whether its number of tokens is the old one or not."""
        model, case = small(), case_of("trace", "sentence")
        writer = regenerator(
            model, case, MaskedRefill(*masked("bert")), units="sentence"
        )
        for gone in ([0], [1, 2], [2, 3], [3], [0, 1, 2, 3]):
            kept = ~np.isin(np.arange(4), gone)
            changed = writer._remover.changed(kept)
            pieces = [
                [token for token, _ in same]
                for is_turn, same in groupby(
                    zip(changed.ids, changed.origin, strict=True),
                    key=lambda one: one[1] >= 0 and case.written[one[1]],
                )
                if not is_turn
            ]
            assert len(pieces) == 2
            ids = pieces[0]
            for _ in range(5):
                ids = [*ids, int(logits_after(model, ids, [False]).argmax())]
            ((written,),) = writer.drafts(kept[None])
            assert list(written.before) == [*ids, *pieces[1]]


class TestEnds:
    """Where a turn ends."""

    @staticmethod
    def that_ends(case, token, number=0):
        """A model that writes a token where another would stand in a turn."""
        model = small()
        turns = turns_of(case.written)[: number + 1]
        turn = by_hand(model, case, "delete", [True] * 99, 6, turns=turns)[2]
        fresh = [i for i in range(1, 6) if turn[i] not in turn[:i]]
        other = turn[fresh[0] if fresh else 0]
        with torch.no_grad():
            rows = model.lm_head.weight
            rows[[token, other]] = rows[[other, token]].clone()
        return model

    def test_the_model_s_own_end_ends_it(self, monkeypatch):
        """Each text of a batch by itself; the end is not part of the turn."""
        case = case_of("text", "word")
        token = tiny_tokenizer().eos_token_id
        model = self.that_ends(case, token)
        kept = np.array(sets(max(case.source) + 1))
        writer = regenerator(model, case, gen_args={"eos_token_id": token})
        by_argument = writer.drafts(kept)
        monkeypatch.setattr(model.generation_config, "eos_token_id", [token])
        found = regenerator(model, case, gen_args=None).drafts(kept)
        lengths = set()
        for one, (written,), (same,) in zip(kept, found, by_argument, strict=True):
            expected = by_hand(model, case, "delete", one, ends=[token])[2]
            assert written.turn == expected
            # Without a number of its own, generate() writes 20 tokens.
            assert same.turn == expected[: len(same.turn)]
            lengths.add(len(written.turn))
        assert len(lengths) > 1

    @pytest.mark.parametrize("number", [0, 1])
    def test_the_mark_that_came_next_ends_it(self, number):
        """Where it is special; it is not written twice."""
        case = case_of("chat trace", "word")
        token = tiny_tokenizer().convert_tokens_to_ids(END)
        model = self.that_ends(case, token, number)
        kept = np.array(sets(max(case.source) + 1))[:3]
        found = regenerator(model, case).drafts(kept)
        turns = turns_of(case.written)
        ends = [case.ids[stop : stop + 1] for _, stop in turns]
        assert ends == [[token], []]  # nothing follows the last turn
        for one, (written,) in zip(kept, found, strict=True):
            ids, turn = [], ()
            for which, (start, _) in enumerate(turns):
                place = turns[which - 1][1] if which else 0
                ids += [
                    case.ids[i]
                    for i in range(place, start)
                    if case.source[i] < 0 or one[case.source[i]]
                ]
                before = tuple(ids)
                turn = []
                while len(turn) < 5:
                    new = int(logits_after(model, ids, [False]).argmax())
                    if new in ends[which]:
                        break
                    turn.append(new)
                    ids.append(new)
            assert (written.before, written.turn) == (before, tuple(turn))

    @pytest.mark.parametrize("is_last", [False, True])
    def test_a_mark_that_the_model_wrote_itself_stays(self, is_last):
        """What comes after a turn is never read without it."""
        tokenizer = tiny_tokenizer()
        end = tokenizer.convert_tokens_to_ids(END)
        asked, heard = tokenizer.encode("Ana has 3 pens."), tokenizer.encode(" First,")
        said = [*tokenizer.encode(" How many?"), end]
        ids = [*asked, *said, *heard, *said]
        wrote = [False] * len(asked) + [True] * len(said)
        wrote = [*wrote, *([False] * len(heard)), *([True] * len(said))]
        model = small()
        case = SimpleNamespace(inp=TraceIdsInput(ids, tokenizer, wrote), generated=[])
        count = len(asked) + len(heard)
        last = len(asked) if not is_last else None
        writer = regenerator(model, case, units="token", last=last)
        ((written,),) = writer.drafts(np.ones((1, count), dtype=bool))
        expected = list(asked)
        for _ in range(5 * is_last):
            expected.append(int(logits_after(model, expected, [False]).argmax()))
        assert list(written.before) == [*expected, *([end, *heard] * is_last)]
        assert len(written.turn) == 5

    def test_texts_end_alone_where_the_user_says_how(self):
        """Each by the user's criterion, as if it were the only one."""
        model, case = small(), case_of("text", "word")
        kept = np.array(sets(max(case.source) + 1))
        long = {"max_new_tokens": 8}
        plain = regenerator(model, case, gen_args=long).drafts(kept)
        last = plain[0][0].turn[1]

        class At(StoppingCriteria):
            def __call__(self, input_ids, scores):
                del scores
                return input_ids[:, -1] == last

        gen_args = {**long, "stopping_criteria": [At()]}
        found = regenerator(model, case, gen_args=gen_args).drafts(kept)
        lengths = set()
        for (whole,), (short,) in zip(plain, found, strict=True):
            turn = [*whole.turn, last]
            assert short.turn == whole.turn[: turn.index(last) + 1]
            lengths.add(len(short.turn))
        assert len(lengths) > 1

    def test_texts_end_where_the_context_does(self):
        """A model reads so many tokens and no more."""
        case = case_of("text", "word")
        kept = np.array(sets(max(case.source) + 1))[:2]
        model = small(max_position_embeddings=case.prompt + 2)
        whole, none = regenerator(model, case).drafts(kept)
        assert (len(whole[0].turn), len(none[0].turn)) == (2, 5)
        model = small(max_position_embeddings=case.prompt)
        with pytest.raises(ValueError, match="must leave room for another turn"):
            regenerator(model, case).drafts(kept[:1])

    @pytest.mark.parametrize("kind", ["chain", "trace", "override"])
    def test_with_all_sources_a_model_that_reasons_says_the_same(self, kind):
        """Word by word, in every turn; without them something else."""
        model, tokenizer = planted_model(kind)
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
        for case in planted_cases(20, 2, kind):
            if any(message["role"] == "assistant" for message in case.before):
                inp = ChatTraceInput(case.before, tokenizer)
            else:
                inp = ChatTokenInput(case.before, tokenizer, features="all")
            answer = tokenizer.encode(case.completion, add_special_tokens=False)
            task = task_of(llm_attr, inp, answer, "sentence")
            remover = Remover(task, "delete")
            writer = Regenerator(remover, len(remover.written) - 1, GREEDY)
            kept = np.ones((2, remover.n_sources), dtype=bool)
            kept[1] = False
            (whole,), (none,) = writer.drafts(kept)
            text = tokenizer.decode([*whole.before, *whole.turn])
            assert text.removesuffix(END) == case.text.removesuffix(END)
            assert none.turn != whole.turn


class TestSampling:
    """Several texts for each set of sources."""

    def test_a_sample_depends_on_nothing_but_its_sources_and_its_number(self):
        """Neither on the batch, nor on the other sets, nor on how many are asked."""
        model, case = small(), case_of("trace", "word")
        kept = np.array(sets(max(case.source) + 1))[:6]
        six = Sampling(6, seed=3, temperature=5.0)
        # Turns end anywhere, so that batches are mixed anew for the second one.
        ends = {**SHORT, "eos_token_id": list(range(7, 107))}
        expected = regenerator(model, case, "delete", six, ends).drafts(kept)
        lengths = {len(one.turn) for drafts in expected for one in drafts}
        assert len(lengths) > 2
        for batch_size in (3, 10):
            writer = regenerator(
                model, case, "delete", six, ends, batch_size=batch_size
            )
            assert writer.drafts(kept) == expected
        writer = regenerator(model, case, "delete", six, ends)
        assert writer.drafts(kept[1:2]) == expected[1:2]
        assert writer.drafts(kept[[5, 2, 1]]) == [expected[i] for i in (5, 2, 1)]
        two = Sampling(2, seed=3, temperature=5.0)
        fewer = regenerator(model, case, "delete", two, ends).drafts(kept)
        assert fewer == [drafts[:2] for drafts in expected]

    def test_a_seed_gives_its_texts_and_another_one_others(self):
        """Global random numbers are not used, and stay as they are."""
        model, case = small(), case_of("text", "word")
        kept = np.array(sets(max(case.source) + 1))[:1]
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = regenerator(model, case, "delete", Sampling(3)).drafts(kept)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert regenerator(model, case, "delete", Sampling(3)).drafts(kept) == first
        other = regenerator(model, case, "delete", Sampling(3, seed=1)).drafts(kept)
        assert not {one.turn for one in first[0]} & {one.turn for one in other[0]}

    def test_each_turn_has_noise_of_its_own(self):
        """A model that says the same of every text does not repeat itself."""
        model, case = small(), case_of("trace", "sentence")
        with torch.no_grad():
            model.lm_head.weight.zero_()
        kept = np.ones((1, max(case.source) + 1), dtype=bool)
        writer = regenerator(model, case, "delete", Sampling(1), units="sentence")
        ((written,),) = writer.drafts(kept)
        start = case.prompt
        assert len(set(written.turn)) > 2  # steps have noise of their own, too
        assert written.before[start : start + 5] != written.turn

    @pytest.mark.parametrize("temperature", [0.5, 1.5])
    def test_tokens_are_as_frequent_as_they_are_probable(self, temperature):
        """The first one, and the one after it."""
        model, case = small(), case_of("text", "word")
        count = 2000
        sampling = Sampling(count, seed=1, temperature=temperature)
        writer = regenerator(
            model, case, "delete", sampling, {"max_new_tokens": 2}, batch_size=1000
        )
        kept = np.ones((1, max(case.source) + 1), dtype=bool)
        turns = np.array([one.turn for one in writer.drafts(kept)[0]])
        ids = torch.tensor([case.ids[: case.prompt]])
        size = len(tiny_tokenizer())
        every = torch.cat([ids.expand(size, -1), torch.arange(size)[:, None]], dim=1)
        with torch.no_grad():
            first = (model(ids).logits[0, -1] / temperature).softmax(-1)
            then = (model(every).logits[:, -1] / temperature).softmax(-1)
        for place, expected in enumerate((first, first @ then)):
            wanted = count * expected.numpy()
            seen = np.bincount(turns[:, place], minlength=size)
            often = wanted >= 5
            # One cell for all that are rare, and one text of them more.
            wanted = np.append(wanted[often], wanted[~often].sum() + 1)
            seen = np.append(seen[often], seen[~often].sum() + 1)
            freedom = len(wanted) - 1
            assert freedom > 10
            chi = ((seen - wanted) ** 2 / wanted).sum()
            assert chi < freedom + 4 * (2 * freedom) ** 0.5

    def test_samples_of_other_sources_share_their_noise(self):
        """They differ by what was taken away: here it says nothing."""
        model, case = small(), case_of("text", "word")
        with torch.no_grad():
            model.lm_head.weight.zero_()
        kept = np.array(sets(max(case.source) + 1))
        found = regenerator(model, case, "delete", Sampling(2)).drafts(kept)
        for drafts in found:
            assert [one.turn for one in drafts] == [one.turn for one in found[0]]
        assert found[0][0].turn != found[0][1].turn

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"samples": 0}, "samples: must be 1 or more"),
            ({"samples": 1.5}, "samples: must be a whole number"),
            ({"seed": -1}, "seed: must be 0 or more"),
            ({"temperature": 0.0}, "temperature: must be a finite number above zero"),
            ({"temperature": float("nan")}, "temperature: must be a finite number"),
            ({"temperature": float("inf")}, "temperature: must be a finite number"),
            ({"temperature": "1"}, "temperature: must be a finite number"),
        ],
    )
    def test_what_is_no_way_to_sample_is_refused(self, arguments, match):
        """By name."""
        with pytest.raises((TypeError, ValueError), match=match):
            Sampling(**arguments)


class TestFeatures:
    """Prompts that are more than tokens."""

    @pytest.mark.parametrize("sampling", [GREEDY, Sampling(3)])
    def test_a_template_is_continued(self, model, tokenizer, sampling):
        """By what it says without some of its words."""
        inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
        case = SimpleNamespace(inp=inp, generated=tokenizer.encode(" How many?"))
        kept = np.array([[True, True], [False, True], [False, False]])
        texts = ["Ana has 3 pens.", " has 3 pens.", " has 3 ."]
        found = regenerator(model, case, "baseline", sampling).drafts(kept)
        for text, drafts in zip(texts, found, strict=True):
            ids = tokenizer.encode(text)
            same = SimpleNamespace(
                inp=TokenIdsInput(ids, tokenizer), generated=case.generated
            )
            writer = regenerator(model, same, "delete", sampling, units="token")
            (expected,) = writer.drafts(np.ones((1, len(ids)), dtype=bool))
            assert [one.turn for one in drafts] == [one.turn for one in expected]
            assert [one.before for one in drafts] == [()] * sampling.count
            assert drafts[0].model_input == text
        assert found[0][0].turn != found[2][0].turn

    def test_a_picture_is_described_again(self, vision_model, tokenizer):
        """As the model generates after what its processor made."""
        inp = image_input(tokenizer)
        case = SimpleNamespace(inp=inp, generated=tokenizer.encode("So she sells 9."))
        kept = np.array([[True, True], [True, False], [False, False]])
        found = regenerator(vision_model, case, "baseline").drafts(kept)
        for one, (written,) in zip(kept, found, strict=True):
            given = inp.to_model_input(torch.tensor(one)[None].int())
            expected = vision_model.generate(**given, do_sample=False, **SHORT)
            start = given["input_ids"].shape[1]
            assert list(written.turn) == expected[0, start:].tolist()


class Recorder(LocalProvider):
    """A provider that notes what it was asked for."""

    def generate(self, prompt, **gen_args):
        """As a server does, which draws by its own random numbers."""
        self.prompts.append((prompt, dict(gen_args)))
        gen_args.pop("seed", None)
        gen_args.update(do_sample=False)
        return super().generate(prompt, **gen_args)


class TestRemote:
    """A provider writes the texts."""

    @staticmethod
    def asked(model, removal, sampling, kept, name="text"):
        """What came, and what the provider was asked for."""
        tokenizer, case = tiny_tokenizer(), case_of(name, "word")
        provider = Recorder(model, tokenizer)
        method = FeatureAblation(RemoteLLMAttribution.placeholder_model)
        llm_attr = RemoteLLMAttribution(method, tokenizer, provider)
        task = task_of(llm_attr, case.inp, case.generated, "word", LATER)
        remover = Remover(task, removal)
        last = len(remover.written) - 1
        found = Regenerator(remover, last, sampling, SHORT).drafts(kept)
        return found, provider.prompts

    @pytest.mark.parametrize("removal", ["delete", "baseline"])
    @pytest.mark.parametrize("name", ["text", "trace"])
    def test_it_gets_the_text_and_is_told_to_be_greedy(self, model, removal, name):
        """What comes back is read as ids."""
        tokenizer, case = tiny_tokenizer(), case_of(name, "word")
        kept = np.array(sets(max(case.source) + 1))[:4]
        found, prompts = self.asked(model, removal, GREEDY, kept, name)
        assert len(prompts) == len(kept) * len(turns_of(case.written))
        told = [arguments for _, arguments in prompts]
        greedy = {"do_sample": False, "temperature": 0.0, **SHORT}
        assert told == [greedy] * len(prompts)
        texts = {text for text, _ in prompts}
        for (written,) in found:
            text = tokenizer.decode(written.before)
            assert text in texts
            ids = torch.tensor([tokenizer.encode(text)])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, **SHORT
            )
            answer = tokenizer.decode(out[0, ids.shape[1] :])
            assert list(written.turn) == tokenizer.encode(answer)

    def test_samples_have_seeds_of_their_own(self, model):
        """The same for the same sample of other sources."""
        kept = np.array(sets(10))[:3]
        _, prompts = self.asked(model, "delete", Sampling(4, temperature=0.7), kept)
        told = [arguments for _, arguments in prompts]
        assert len(told) == 12
        assert {one["temperature"] for one in told} == {0.7}
        assert all(one["do_sample"] for one in told)
        seeds = [one["seed"] for one in told]
        assert len(set(seeds)) == 4
        assert all(seeds.count(seed) == 3 for seed in seeds)


class TestWork:
    """What is done, and what is left behind."""

    def test_the_model_is_left_as_it_was(self):
        """Its mode, hooks, attention and settings, after an interrupt too."""
        model, case = small(), case_of("text", "word")
        model.model.layers[1].train()
        kept = np.array(sets(max(case.source) + 1))[:3]

        def state():
            modules = list(model.modules())
            return (
                [module.training for module in modules],
                [len(m._forward_pre_hooks) for m in modules],
                [len(m._forward_hooks) for m in modules],
                model.config.to_dict(),
                model.config._attn_implementation,
                model.generation_config.to_dict(),
            )

        before = copy.deepcopy(state())
        for removal in REMOVALS:
            regenerator(model, case, removal, Sampling(2)).drafts(kept)
            assert state() == before

        class Stop(LogitsProcessor):
            def __call__(self, *_):
                raise KeyboardInterrupt

        writer = regenerator(
            model, case, "suppress", gen_args={"logits_processor": [Stop()]}
        )
        with pytest.raises(KeyboardInterrupt):
            writer.drafts(kept)
        assert state() == before

    def test_a_model_in_training_writes_as_it_does_later(self):
        """Nothing is dropped."""
        model, case = small(attention_dropout=0.5), case_of("text", "word")
        kept = np.array(sets(max(case.source) + 1))[:3]
        expected = regenerator(model, case).drafts(kept)
        model.train()
        assert regenerator(model, case).drafts(kept) == expected
        assert all(module.training for module in model.modules())

    def test_what_is_written_is_kept(self, monkeypatch):
        """A set of sources is asked for once."""
        model, case = small(), case_of("text", "word")
        asked = []
        generate = model.generate

        def counted(**arguments):
            asked.append(len(arguments["input_ids"]))
            return generate(**arguments)

        monkeypatch.setattr(model, "generate", counted)
        kept = np.array(sets(max(case.source) + 1))
        writer = regenerator(model, case, "baseline", Sampling(2))
        first = writer.drafts(kept[:3])
        assert asked == [6]
        assert writer.drafts(kept[[2, 0, 2]]) == [first[i] for i in (2, 0, 2)]
        assert asked == [6]
        writer.drafts(kept[2:5])
        assert asked == [6, 4]
        assert writer.sequences == 10

    def test_an_interrupted_call_goes_on(self, monkeypatch):
        """Texts that were finished are not written again."""
        model, case = small(), case_of("trace", "word")
        kept = np.array(sets(max(case.source) + 1))[:6]
        expected = regenerator(model, case, "baseline").drafts(kept)
        generate = model.generate
        asked = []

        def stopping(**arguments):
            asked.append(arguments["input_ids"].tolist())
            if len(asked) == 4:  # the second turn of the second batch
                raise KeyboardInterrupt
            return generate(**arguments)

        monkeypatch.setattr(model, "generate", stopping)
        writer = regenerator(model, case, "baseline", batch_size=2)
        with pytest.raises(KeyboardInterrupt):
            writer.drafts(kept)
        assert writer.drafts(kept) == expected
        # Three batches of two turns, and the second batch once more.
        assert len(asked) == 8
        assert asked[4] == asked[2] != asked[0]

    def test_a_batch_that_does_not_fit_is_halved(self, monkeypatch):
        """Until it fits; one text that does not is an error."""
        model, case = small(), case_of("text", "word")
        kept = np.array(sets(max(case.source) + 1))[:8]
        expected = regenerator(model, case, "suppress", Sampling(2)).drafts(kept)
        generate = model.generate
        most, asked = 3, []

        def limited(**arguments):
            asked.append(len(arguments["input_ids"]))
            if asked[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return generate(**arguments)

        monkeypatch.setattr(model, "generate", limited)
        writer = regenerator(model, case, "suppress", Sampling(2))
        assert writer.drafts(kept) == expected
        assert asked == [16, 8, 4, *([2] * 8)]
        assert writer.sequences == 16
        most = 0
        with pytest.raises(RuntimeError, match="one sequence must fit into memory"):
            regenerator(model, case, "suppress").drafts(kept)

    def test_beams_and_chance_in_the_model_s_settings_change_nothing(self):
        """Models come with settings for talking."""
        model, case = small(), case_of("text", "word")
        kept = np.array(sets(max(case.source) + 1))
        expected = regenerator(model, case).drafts(kept)
        model.generation_config.update(num_beams=4, do_sample=True, top_k=3)
        assert regenerator(model, case).drafts(kept) == expected
        model.generation_config.update(return_dict_in_generate=True)
        assert regenerator(model, case).drafts(kept) == expected

    @pytest.mark.parametrize(
        "name", ["do_sample", "num_beams", "temperature", "top_p", "seed"]
    )
    def test_how_tokens_are_drawn_is_not_for_gen_args(self, model, name):
        """There are arguments for that."""
        with pytest.raises(
            ValueError, match=f"gen_args: must leave .* but {name} came"
        ):
            regenerator(model, case_of("ids", "word"), gen_args={name: 1})

    def test_a_model_that_cannot_write_is_refused(self):
        """Nothing can be written again."""

        class Scores(nn.Module):
            device = torch.device("cpu")

            def forward(self, input_ids, attention_mask=None):
                raise NotImplementedError

        with pytest.raises(TypeError, match="needs a model that can write the text"):
            regenerator(Scores(), case_of("ids", "word"))

    def test_what_is_done_anyway_may_be_asked_for(self, model):
        """Captum's own default among it: no sampling, and settings left open."""
        case = case_of("ids", "word")
        kept = np.ones((1, max(case.source) + 1), dtype=bool)
        plain = {"max_new_tokens": 5}
        asked = {**plain, "do_sample": False, "temperature": None, "top_p": None}
        texts = [
            regenerator(model, case, gen_args=one).drafts(kept)[0][0].turn
            for one in (plain, asked)
        ]
        assert texts[0] == texts[1]

    @pytest.mark.parametrize(
        ("given", "error", "match"),
        [
            (3, TypeError, "gen_args: must be a mapping"),
            (
                {"max_new_tokens": 0},
                ValueError,
                r"gen_args\['max_new_tokens'\]: must be",
            ),
            ({"max_new_tokens": "9"}, TypeError, r"gen_args\['max_new_tokens'\]: must"),
        ],
    )
    def test_arguments_of_generate_are_checked(self, model, given, error, match):
        """Before the model is asked."""
        with pytest.raises(error, match=match):
            regenerator(model, case_of("ids", "word"), gen_args=given)
