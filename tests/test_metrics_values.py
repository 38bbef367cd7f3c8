"""What is left of a statement, against one plain pass for each text."""

from __future__ import annotations

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

from captum_cage.metrics.regeneration import Regenerator, Sampling, Written
from captum_cage.metrics.removal import MaskedRefill, Remover
from captum_cage.metrics.statement import Statement
from captum_cage.metrics.values import (
    SHOWS,
    FixedText,
    Passes,
    Probability,
    Regenerated,
    Scored,
    TextScorer,
    Value,
)
from test_methods_reagent import masked
from test_metrics_regeneration import logits_after, small
from test_metrics_removal import BASELINE, LATER, case_of, sets
from tiny import (
    ARCHITECTURES,
    LocalProvider,
    image_input,
    task_of,
    tiny_tokenizer,
    tiny_vision_model,
)

NAMES = ("text", "some skipped", "groups", "chat", "trace", "chat trace")


def wrapped(model):
    """A wrapped model."""
    return LLMAttribution(FeatureAblation(model), tiny_tokenizer())


def remote(model):
    """The same model as a provider, and the provider."""
    provider = LocalProvider(model, tiny_tokenizer())
    method = FeatureAblation(RemoteLLMAttribution.placeholder_model)
    return RemoteLLMAttribution(method, tiny_tokenizer(), provider), provider


def scorer_of(llm_attr, case, removal, batch_size=None, units="word"):
    """What scores the written tokens of a case."""
    task = task_of(llm_attr, case.inp, case.generated, units, LATER)
    return TextScorer(Remover(task, removal), Passes(llm_attr, batch_size))


def log_prob(model, ids, hidden, token):
    """Log-probability of a token after others, by one pass."""
    return float(logits_after(model, ids, hidden).double().log_softmax(-1)[token])


def by_hand(model, case, removal, kept):
    """Score of each written token, by one pass for each."""
    ids, hidden, found = [], [], []
    for place, (token, source) in enumerate(zip(case.ids, case.source, strict=True)):
        if case.written[place]:
            if not ids:
                ids, hidden = [BASELINE], [False]
            found.append(log_prob(model, ids, hidden, token))
        gone = source >= 0 and not kept[source]
        if gone and removal == "delete":
            continue
        if gone and removal == "baseline":
            token = BASELINE if place < case.prompt else LATER
        ids.append(token)
        hidden.append(gone and removal == "suppress")
    return found


def texts_of(count, seed=0, hide=False):
    """Random texts of many lengths, and which of their tokens are scored."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        size = int(rng.integers(3, 40))
        ids = rng.integers(7, 300, size).tolist()
        hidden = (rng.random(size) < 0.3) & hide
        some = rng.choice(np.arange(1, size), int(rng.integers(1, size)), replace=False)
        found.append(Scored(ids, hidden, np.sort(some)))
    return found


class TestPasses:
    """Many texts in one pass."""

    @pytest.mark.parametrize("hide", [False, True])
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_texts_are_scored_as_if_each_were_alone(self, arch, hide):
        """Whatever fills up the shorter ones."""
        model, texts = small(arch), texts_of(5, hide=hide)
        passes = Passes(wrapped(model))
        found = passes.scores(texts)
        assert passes.sequences == 5
        assert len({len(text.ids) for text in texts}) > 1
        for text, scores in zip(texts, found, strict=True):
            assert scores.dtype == np.float64
            expected = [
                log_prob(model, text.ids[:i], text.hidden[:i], text.ids[i])
                for i in text.places.tolist()
            ]
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
    def test_the_batch_changes_nothing(self, batch_size, monkeypatch):
        """And is as large as asked for, however long the texts are."""
        enough = {"cpu": 64, "cuda": 64}
        monkeypatch.setattr("captum_cage.metrics.values._ENOUGH_TOKENS", enough)
        model, texts = small(), texts_of(12)
        expected = Passes(wrapped(model)).scores(texts)
        sizes = []
        forward = model.forward

        def counted(input_ids, **arguments):
            sizes.append(len(input_ids))
            return forward(input_ids=input_ids, **arguments)

        monkeypatch.setattr(model, "forward", counted)
        found = Passes(wrapped(model), batch_size).scores(texts)
        assert (max(sizes), sum(sizes)) == (min(batch_size, 12), 12)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)

    def test_no_pass_has_more_tokens_than_are_of_use(self, model, monkeypatch):
        """Counted with what fills up the shorter texts, unless it is a single one."""
        shapes = []
        forward = model.forward

        def counted(input_ids, **arguments):
            shapes.append(tuple(input_ids.shape))
            return forward(input_ids=input_ids, **arguments)

        monkeypatch.setattr(model, "forward", counted)
        enough = {"cpu": 64, "cuda": 64}
        monkeypatch.setattr("captum_cage.metrics.values._ENOUGH_TOKENS", enough)
        texts = [Scored([9] * n, [False] * n, np.array([1])) for n in range(2, 80)]
        Passes(wrapped(model)).scores(texts)
        assert sum(size for size, _ in shapes) == 78
        assert all(size * length <= 64 or size == 1 for size, length in shapes)
        assert max(size for size, _ in shapes) > 4

    def test_a_batch_that_does_not_fit_is_halved(self, monkeypatch):
        """Until it fits; one text that does not is an error."""
        model, texts = small(), texts_of(10)
        expected = Passes(wrapped(model)).scores(texts)
        forward = model.forward
        most, sizes = 2, []

        def limited(input_ids, **arguments):
            sizes.append(len(input_ids))
            if sizes[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(input_ids=input_ids, **arguments)

        monkeypatch.setattr(model, "forward", limited)
        for batch_size in (None, 10):
            sizes.clear()
            passes = Passes(wrapped(model), batch_size)
            found = passes.scores(texts)
            assert sizes == [10, 5, *([2] * 5)]
            assert passes.sequences == 10
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)
        most = 0
        with pytest.raises(RuntimeError, match="one sequence must fit into memory"):
            Passes(wrapped(model)).scores(texts)

    def test_a_text_beyond_the_context_is_refused(self):
        """Before the model is asked, which might fail in its own way, or not at all."""
        model = small(max_position_embeddings=16)
        texts = [Scored([9] * n, [False] * n, np.array([1])) for n in (16, 17)]
        assert len(Passes(wrapped(model)).scores(texts[:1])) == 1
        passes = Passes(wrapped(model))
        with pytest.raises(ValueError, match=r"context of 16 tokens.*are 17"):
            passes.scores(texts)
        assert passes.sequences == 0

    def test_a_model_in_training_says_what_it_says_later(self):
        """Nothing is dropped; it goes on training."""
        model, texts = small(attention_dropout=0.5), texts_of(3)
        expected = Passes(wrapped(model)).scores(texts)
        template = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
        case = SimpleNamespace(inp=template, generated=[9, 10])
        kept = np.array([[True, False]])
        plain = scorer_of(wrapped(model), case, "baseline").scores(kept)
        drafts = drafts_of([" How many?"], model_input="Ana")
        value = Probability(drafts, Passes(wrapped(model)), "", [9], wrapped(model))
        probability = value(kept)
        model.train()
        for one, other in zip(
            Passes(wrapped(model)).scores(texts), expected, strict=True
        ):
            np.testing.assert_array_equal(one, other)
        again = scorer_of(wrapped(model), case, "baseline").scores(kept)
        np.testing.assert_array_equal(again, plain)
        value = Probability(drafts, Passes(wrapped(model)), "", [9], wrapped(model))
        np.testing.assert_array_equal(value(kept), probability)
        assert all(module.training for module in model.modules())


class TestFixedText:
    """The generated text as it was."""

    @pytest.mark.parametrize("removal", ["delete", "baseline", "suppress"])
    @pytest.mark.parametrize("name", NAMES)
    def test_scores_are_those_of_plain_passes(self, name, removal):
        """Of all written tokens, in every turn."""
        model, case = small(), case_of(name, "word")
        kept = np.array(sets(max(case.source) + 1))[:6]
        found = scorer_of(wrapped(model), case, removal).scores(kept)
        expected = [by_hand(model, case, removal, one) for one in kept]
        assert found.shape == (6, sum(case.written))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
        assert np.ptp(found, axis=0).min() > 1e-6

    def test_what_was_scored_before_an_interrupt_is_kept(self, monkeypatch):
        """And the model is asked for the rest alone."""
        model, case = small(), case_of("text", "word")
        kept = np.array(sets(max(case.source) + 1))[:6]
        expected = scorer_of(wrapped(model), case, "delete").scores(kept)
        forward, calls = model.forward, []

        def interrupted(input_ids, **arguments):
            calls.append(len(input_ids))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return forward(input_ids=input_ids, **arguments)

        monkeypatch.setattr(model, "forward", interrupted)
        scorer = scorer_of(wrapped(model), case, "delete", batch_size=1)
        with pytest.raises(KeyboardInterrupt):
            scorer.scores(kept)
        found = scorer.scores(kept)
        assert len(calls) == 4 + 3
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("removal", ["delete", "suppress"])
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_every_architecture_is_read_alike(self, arch, removal):
        """With windows, too."""
        model, case = small(arch), case_of("chat trace", "sentence")
        kept = np.array(sets(max(case.source) + 1))[:4]
        llm_attr = wrapped(model)
        found = scorer_of(llm_attr, case, removal, units="sentence").scores(kept)
        expected = [by_hand(model, case, removal, one) for one in kept]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)

    def test_what_a_masked_model_wrote_is_read(self):
        """The written tokens are scored wherever they have come to stand."""
        model, case = small(), case_of("trace", "sentence")
        llm_attr = wrapped(model)
        refill = MaskedRefill(*masked("bert"))
        scorer = scorer_of(llm_attr, case, refill, units="sentence")
        kept = np.array([[True] * 4, [False, True, True, True], [True, False] * 2])
        lengths = set()
        for one, scores in zip(kept, scorer.scores(kept), strict=True):
            changed = scorer._remover.changed(one)
            lengths.add(len(changed.ids))
            places = [
                place
                for place, origin in enumerate(changed.origin.tolist())
                if origin >= 0 and case.written[origin]
            ]
            assert [changed.ids[i] for i in places] == [
                token for token, w in zip(case.ids, case.written, strict=True) if w
            ]
            expected = [
                log_prob(model, list(changed.ids[:i]), [False], changed.ids[i])
                for i in places
            ]
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-10)
        assert len(lengths) > 1

    def test_a_value_is_the_sum_over_its_tokens(self):
        """And is asked for once for each set."""
        model, case = small(), case_of("trace", "word")
        llm_attr = wrapped(model)
        scorer = scorer_of(llm_attr, case, "delete")
        kept = np.array(sets(max(case.source) + 1))[:5]
        expected = np.array([by_hand(model, case, "delete", one) for one in kept])
        span = FixedText("span", scorer, scorer._remover, [1, 4])
        found = span(kept[[0, 1, 0]])
        np.testing.assert_allclose(found, expected[[0, 1, 0]][:, [1, 4]].sum(axis=1))
        assert scorer._passes.sequences == 2
        response = FixedText(
            "response", scorer, scorer._remover, range(expected.shape[1])
        )
        np.testing.assert_allclose(response.samples(kept), expected.sum(1)[:, None])
        span(kept)
        assert scorer._passes.sequences == 5

    def test_a_template_is_read_without_some_words(self):
        """By one plain pass over the text that is left."""
        model, tokenizer = small(), tiny_tokenizer()
        inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
        answer = tokenizer.encode(" How many?")
        case = SimpleNamespace(inp=inp, generated=answer)
        scorer = scorer_of(wrapped(model), case, "baseline")
        kept = np.array([[True, True], [False, True], [False, False]])
        found = scorer.scores(kept)
        for text, scores in zip(
            ["Ana has 3 pens.", " has 3 pens.", " has 3 ."], found, strict=True
        ):
            ids = [*tokenizer.encode(text), *answer]
            before = len(ids) - len(answer)
            expected = [
                log_prob(model, ids[:i], [False], ids[i])
                for i in range(before, len(ids))
            ]
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-10)

    def test_a_picture_is_seen_without_some_parts(self):
        """By one plain pass over what the processor makes of it."""
        tokenizer = tiny_tokenizer()
        model = tiny_vision_model(len(tokenizer)).double()
        inp = image_input(tokenizer)
        answer = tokenizer.encode("So she sells 9.")
        case = SimpleNamespace(inp=inp, generated=answer)
        scorer = scorer_of(wrapped(model), case, "baseline")
        kept = np.array([[True, True], [True, False], [False, False]])
        found = scorer.scores(kept)
        for one, scores in zip(kept, found, strict=True):
            given = inp.to_model_input(torch.tensor(one)[None].int())
            ids = torch.cat([given["input_ids"], torch.tensor([answer])], dim=1)
            with torch.no_grad():
                logits = model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=given["pixel_values"].double(),
                ).logits[0, -len(answer) - 1 : -1]
            logs = logits.log_softmax(-1)
            expected = logs[range(len(answer)), answer]
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-10)
        assert np.ptp(found, axis=0).max() > 1e-6


class TestRemote:
    """A provider scores texts."""

    @pytest.mark.parametrize("removal", ["delete", "baseline"])
    @pytest.mark.parametrize("name", ["text", "groups", "chat", "trace", "chat trace"])
    def test_it_says_what_the_model_says(self, name, removal):
        """One request for each set of sources."""
        model, case = small(), case_of(name, "word")
        kept = np.unique(sets(max(case.source) + 1)[:5], axis=0)
        llm_attr, provider = remote(model)
        scorer = scorer_of(llm_attr, case, removal)
        found = scorer.scores(kept)
        expected = [by_hand(model, case, removal, one) for one in kept]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
        assert len(provider.prompts) == scorer._passes.sequences == len(kept)
        scorer.scores(kept)
        assert len(provider.prompts) == len(kept)

    def test_words_of_a_template_can_be_left_out(self):
        """The provider gets the text that is left."""
        model, tokenizer = small(), tiny_tokenizer()
        inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
        case = SimpleNamespace(inp=inp, generated=tokenizer.encode(" How many?"))
        kept = np.array([[True, True], [False, True]])
        llm_attr, provider = remote(model)
        found = scorer_of(llm_attr, case, "baseline").scores(kept)
        expected = scorer_of(wrapped(model), case, "baseline").scores(kept)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
        assert provider.prompts == ["Ana has 3 pens.", " has 3 pens."]

    def test_other_tokens_than_those_sent_are_refused(self, monkeypatch):
        """Scores would stand for the wrong ones."""
        model, case = small(), case_of("text", "word")
        llm_attr, provider = remote(model)
        monkeypatch.setattr(provider, "get_logprobs", lambda **_: [-1.0, -2.0])
        kept = np.ones((1, max(case.source) + 1), dtype=bool)
        with pytest.raises(ValueError, match="provider must score 6 tokens, but 2 sco"):
            scorer_of(llm_attr, case, "delete").scores(kept)


def drafts_of(turns, before="Ana has 3 pens.", hidden=(), model_input=None):
    """What stands for a regenerator: for each set of sources the same turns."""
    tokenizer = tiny_tokenizer()
    ids = () if model_input is not None else tuple(tokenizer.encode(before))
    hides = tuple(place in hidden for place in range(len(ids)))
    drafts = tuple(
        Written(ids, hides, tuple(tokenizer.encode(turn)), model_input)
        for turn in turns
    )
    return SimpleNamespace(drafts=lambda kept: [drafts] * len(kept))


class TestRegenerated:
    """Share of the texts that come to the statement."""

    def test_it_is_what_the_statement_says_of_each_text(self):
        """And their mean."""
        said = [" The answer is 18.", " The answer is 9.", " It is 18, e.g. 9."]
        value = Regenerated(
            drafts_of(said), Statement("18", "The answer is 18."), tiny_tokenizer()
        )
        kept = np.array([[True, False], [False, False]])
        assert value.samples(kept).tolist() == [[1.0, 0.0, 1.0]] * 2
        np.testing.assert_allclose(value(kept), [2 / 3, 2 / 3])

    def test_texts_are_written_once_for_each_set(self):
        """With those that the model writes."""
        model, case = small(), case_of("text", "word")
        llm_attr = wrapped(model)
        task = task_of(llm_attr, case.inp, case.generated, "word")
        writer = Regenerator(
            Remover(task, "delete"),
            len(case.ids) - 1,
            Sampling(3),
            {"max_new_tokens": 4},
        )
        kept = np.array(sets(max(case.source) + 1))[:4]
        turns = [
            [tiny_tokenizer().decode(one.turn) for one in drafts]
            for drafts in writer.drafts(kept)
        ]
        statement = Statement(lambda text: len(text) / 100, " How many?")
        value = Regenerated(writer, statement, tiny_tokenizer())
        expected = [[len(text) / 100 for text in texts] for texts in turns]
        assert value.samples(kept[[1, 0, 1]]).tolist() == [
            expected[number] for number in (1, 0, 1)
        ]
        np.testing.assert_allclose(value(kept), np.mean(expected, axis=1))
        assert writer.sequences == 12


class TestProbability:
    """Of the explained text after what was written again before it."""

    BEFORE = " First, read the text. Second, think!"
    TARGET = " The answer is 18."
    # What is written, and what of it stays before the target.
    TURNS = (
        (" So she sells 9. The answer is 18.", " So she sells 9."),
        (" The answer is 18. So? The answer is 18.", " The answer is 18. So?"),
        (" The answer is 18. So she sells 9.", ""),
        (" So she sells 9. Why? Mia has 4. How many?", " So she sells 9. Why?"),
        (" So she sells 9", " So she sells 9"),
        (" First, read the text.\n The answer is 18.", " First, read the text."),
        ("", ""),
    )

    def value(self, model, drafts, target=TARGET, before=BEFORE):
        """The value of a target after drafts."""
        ids = target if isinstance(target, list) else tiny_tokenizer().encode(target)
        llm_attr = wrapped(model)
        return Probability(drafts, Passes(llm_attr), before, ids, llm_attr)

    @staticmethod
    def slowly(model, ids, hidden, target):
        """Probability of some ids, by one pass for each."""
        hidden = [*hidden, *([False] * len(ids))]
        logs = []
        for token in tiny_tokenizer().encode(target):
            logs.append(log_prob(model, ids, hidden[: len(ids)], token))
            ids = [*ids, token]
            hidden.append(False)
        return float(np.exp(sum(logs)))

    def test_it_keeps_no_more_than_the_context_has_room_for(self):
        """A turn that ran away is cut at its end, so that the statement fits."""
        tokenizer = tiny_tokenizer()
        turn = " So she sells 9" * 4
        start, own = tokenizer.encode("Ana has 3 pens."), tokenizer.encode(turn)
        target = tokenizer.encode(self.TARGET)
        room = len(start) + 7 + len(target)
        model = small(max_position_embeddings=room)
        found = self.value(model, drafts_of([turn])).samples(
            np.ones((1, 3), dtype=bool)
        )
        hides = [False] * len(start)
        expected = self.slowly(model, [*start, *own[:7]], hides, self.TARGET)
        assert len(own) > 7
        np.testing.assert_allclose(found[0], expected, rtol=1e-9)

    @pytest.mark.parametrize("hidden", [(), (1, 3)])
    def test_it_follows_what_stands_before_the_statement(self, hidden):
        """Or as many sentences as stood there, where it does not occur."""
        model, tokenizer = small(), tiny_tokenizer()
        drafts = drafts_of([turn for turn, _ in self.TURNS], hidden=hidden)
        found = self.value(model, drafts).samples(np.ones((2, 3), dtype=bool))
        start = tokenizer.encode("Ana has 3 pens.")
        hides = [place in hidden for place in range(len(start))]
        expected = [
            self.slowly(model, [*start, *tokenizer.encode(stays)], hides, self.TARGET)
            for _, stays in self.TURNS
        ]
        assert len(set(expected)) >= 5
        np.testing.assert_allclose(found, [expected] * 2, rtol=1e-9)

    def test_its_mean_is_that_of_probabilities(self):
        """Not of their logarithms."""
        model = small()
        drafts = drafts_of([turn for turn, _ in self.TURNS])
        value = self.value(model, drafts)
        kept = np.ones((1, 3), dtype=bool)
        assert value(kept)[0] == pytest.approx(
            value.samples(kept).mean(), rel=1e-12, abs=0.0
        )

    def test_it_follows_a_template_too(self):
        """By plain passes over its text."""
        model, tokenizer = small(), tiny_tokenizer()
        drafts = drafts_of(
            [turn for turn, _ in self.TURNS], model_input="Ana has 3 pens."
        )
        found = self.value(model, drafts).samples(np.ones((1, 3), dtype=bool))[0]
        start = tokenizer.encode("Ana has 3 pens.")
        expected = [
            self.slowly(model, [*start, *tokenizer.encode(stays)], [], self.TARGET)
            for _, stays in self.TURNS
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-9)

    def test_the_mark_at_the_end_of_a_turn_is_scored_but_not_looked_for(self):
        """No turn that is written again has it."""
        model, tokenizer = small(), tiny_tokenizer()
        ids = [*tokenizer.encode(self.TARGET), tokenizer.eos_token_id]
        drafts = drafts_of([turn for turn, _ in self.TURNS[:3]])
        value = self.value(model, drafts, target=ids)
        found = value.samples(np.ones((1, 3), dtype=bool))[0]
        start = tokenizer.encode("Ana has 3 pens.")
        for one, (_, stays) in zip(found, self.TURNS[:3], strict=True):
            before = [*start, *tokenizer.encode(stays)]
            expected = self.slowly(model, before, [], self.TARGET + "<eos>")
            assert one == pytest.approx(expected, rel=1e-9, abs=0.0)


class TestValues:
    """What all of them have."""

    def test_each_says_what_it_shows(self):
        """By its name."""
        for name, shows in SHOWS.items():
            assert Value(name).shows == shows
            assert Value(name).name == name

    def test_sets_are_asked_for_once(self):
        """In the order in which they came, whatever came before."""
        asked = []

        class Sums(Value):
            def _values(self, kept):
                asked.append(kept.tolist())
                return kept.sum(axis=1, keepdims=True) * [1.0, 3.0]

        value = Sums("span")
        one, two, none = [True, False], [True, True], [False, False]
        assert value(np.array([one, two, one])).tolist() == [2.0, 4.0, 2.0]
        assert value(np.array([none, two])).tolist() == [0.0, 4.0]
        assert value.samples(np.array([two, one])).tolist() == [[2.0, 6.0], [1.0, 3.0]]
        assert asked == [[one, two], [none]]
