"""Questions that ask the model again: finer units, and what else might be written."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    RemoteLLMAttribution,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)

from captum_cage import (
    ChatTokenInput,
    ChatTraceInput,
    GraphAttributionResult,
    GraphContextAttribution,
    Part,
    TokenIdsInput,
)
from captum_cage.methods.catalogue import llm_attribution
from conftest import PROMPT, TARGET
from tiny import LocalProvider, image_input

PROMPT_UNITS = ["Ana has 3 pens.", "Mia has 4 more pens than Ana."]
ANSWER = "The answer is 7."
# Methods whose rows are the same each time, and what makes them fast.
METHODS: dict[str, dict[str, int]] = {
    "ablation": {},
    "attention-suppression": {},
    "integrated-gradients": {"n_steps": 3},
    "gradient-x-activation": {},
    "ifr": {},
    "clp-cage": {},
}
MESSAGES = [
    {"role": "user", "content": "Ana has 3 pens. Mia has 4 more pens than Ana."},
    {"role": "assistant", "content": "First, read the text. Mia has 7 pens."},
    {"role": "tool", "content": "The answer is 18. So she sells 9 of them."},
    {"role": "assistant", "content": "Second, think! The answer is 7."},
]


@pytest.fixture
def cage(model, tokenizer):
    """Ablation of the small model."""
    return GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))


@pytest.fixture
def coarse(cage, tokenizer):
    """The last sentence explained, over sentences."""
    inp = TextTokenInput(PROMPT, tokenizer)
    return cage.attribute(inp, TARGET, units="sentence", explain=ANSWER)


def ranges_of(result: GraphAttributionResult) -> dict[str, list[tuple[int, int]]]:
    """The units of a result as ranges that `attribute` takes."""
    first = int(result.graph.generated_units[0])
    spans = [unit.span for unit in result.units]
    return {"source": spans[:first], "generated": spans[first:]}


def assert_same(one: GraphAttributionResult, other: GraphAttributionResult) -> None:
    """Two results say the same of the same units."""
    assert [(u.text, u.generated, u.span) for u in one.units] == [
        (u.text, u.generated, u.span) for u in other.units
    ]
    assert one.explained == other.explained
    assert one.foils == other.foils
    assert one.hops == other.hops
    assert one.graph.normalization == other.graph.normalization
    np.testing.assert_allclose(one.graph.rows, other.graph.rows, atol=2e-5)
    np.testing.assert_allclose(one.seq_attr, other.seq_attr, atol=2e-4)
    np.testing.assert_allclose(one.step_attr, other.step_attr, atol=2e-4)
    np.testing.assert_allclose(one.output_probs, other.output_probs, rtol=1e-4)


def texts(result: GraphAttributionResult) -> list[str]:
    """Text of each unit."""
    return [unit.text for unit in result.units]


class TestFinerUnits:
    """A refined result is what a fresh run gives with the same mixed units."""

    @pytest.mark.parametrize("side", ["source", "generated", "both"])
    @pytest.mark.parametrize("method", list(METHODS))
    def test_it_is_the_answer_over_the_mixed_units(
        self, method, side, model, tokenizer
    ):
        """For methods that perturb and for those that take gradients."""
        llm_attr = llm_attribution(method, model, tokenizer)
        cage = GraphContextAttribution(llm_attr, normalization="absolute")
        inp = TextTokenInput(PROMPT, tokenizer)
        options = METHODS[method]
        coarse = cage.attribute(inp, TARGET, units="sentence", explain=-1, **options)
        finer = coarse.refine(1, "word", side=side)
        assert len(finer.units) > len(coarse.units)
        count = len(finer.explained)
        assert count == (4 if side != "source" else 1)
        fresh = cage.attribute(
            inp,
            TARGET,
            units=ranges_of(finer),
            explain=slice(-count, None),
            **options,
        )
        assert_same(finer, fresh)
        assert finer.meta["strategy"] == coarse.meta["strategy"] == "fused"
        assert finer.meta["units"] == "own"

    def test_it_is_so_for_the_loop_and_for_random_methods(self, model, tokenizer):
        """Given the same random numbers."""
        inp = TextTokenInput(PROMPT, tokenizer)
        for method, strategy in (
            (FeatureAblation, "loop"),
            (ShapleyValueSampling, "auto"),
        ):
            cage = GraphContextAttribution(LLMAttribution(method(model), tokenizer))
            options: dict[str, Any] = {"strategy": strategy, "explain": -1}
            if method is ShapleyValueSampling:
                options["n_samples"] = 3
            coarse = cage.attribute(inp, TARGET, units="sentence", **options)
            torch.manual_seed(3)
            finer = coarse.refine(1)
            torch.manual_seed(3)
            fresh = cage.attribute(inp, TARGET, units=ranges_of(finer), **options)
            assert_same(finer, fresh)
            assert finer.meta["strategy"] == fresh.meta["strategy"]

    def test_it_can_be_repeated_down_to_tokens(self, model, tokenizer):
        """From sentences to words to tokens, until nothing can be divided."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer), normalization="absolute"
        )
        inp = TextTokenInput(PROMPT, tokenizer)
        result = cage.attribute(inp, TARGET, units="sentence", explain=-1)
        lengths = [len(result.units)]
        for to in ("word", "token"):
            while True:
                try:
                    result = result.refine(2, to, side="both")
                except ValueError as error:
                    assert "must divide a unit that has mass" in str(error)  # noqa: PT017
                    break
                lengths.append(len(result.units))
        assert lengths == sorted(set(lengths))
        tokens = cage.attribute(
            inp, TARGET, explain=slice(-len(result.explained), None)
        )
        assert result.explained == tokens.explained
        assert lengths[-1] == len(tokens.units)
        np.testing.assert_allclose(result.graph.rows, tokens.graph.rows, atol=2e-5)
        np.testing.assert_allclose(result.seq_attr, tokens.seq_attr, atol=2e-4)
        # Texts of tokens alone have their white space.
        assert [text.strip() for text in texts(result)] == [
            text.strip() for text in texts(tokens)
        ]

    def test_only_the_heaviest_are_split(self, model, tokenizer):
        """The others are the units that they were."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer), normalization="absolute"
        )
        prompt = f"{PROMPT} So she sells 9 of them. Read the text. Third, write it."
        inp = TextTokenInput(prompt, tokenizer)
        coarse = cage.attribute(inp, TARGET, units="sentence", explain=-1)
        order = np.argsort(-coarse.seq_attr.numpy())
        for top in (1, 2, 4):
            finer = coarse.refine(top)
            stayed = [unit for unit in coarse.units if unit in finer.units]
            split = set(order[:top].tolist())
            assert stayed == [
                unit for i, unit in enumerate(coarse.units) if i not in split
            ]
            words = [w for i in sorted(split) for w in texts(coarse)[i].split()]
            added = [unit.text for unit in finer.units if unit not in coarse.units]
            assert added == words
        assert len(coarse.refine(99).units) == len(coarse.refine(5).units)

    def test_the_heaviest_of_those_that_can_be_divided(self, model, tokenizer):
        """A unit that is a word already does not count."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer), normalization="absolute"
        )
        inp = TextTokenInput(PROMPT, tokenizer)
        coarse = cage.attribute(inp, TARGET, units="sentence", explain=-1)
        finer = coarse.refine(1)
        whole = [text for text in PROMPT_UNITS if text in texts(finer)]
        assert len(whole) == 1
        finest = finer.refine(1)
        assert whole[0] not in texts(finest)
        assert texts(finest)[: len(PROMPT.split())] == PROMPT.split()

    def test_generated_units_are_chosen_by_the_mass_through_them(self, coarse):
        """The explained one has all of it; then those that it depends on."""
        mass = coarse.step_attr.numpy()
        assert mass.argmax() == 1
        finer = coarse.refine(1, side="generated")
        assert texts(finer)[:2] == PROMPT_UNITS
        assert texts(finer)[3:] == ANSWER.split()
        both = coarse.refine(2, side="generated")
        assert len(both.units) == 2 + len(TARGET.split())
        assert both.weights.sum() == len(ANSWER.split())

    def test_own_functions_divide(self, coarse):
        """They get the text of one unit."""
        seen = []

        def in_two(text: str) -> list[tuple[int, int]]:
            seen.append(text)
            cut = len(text) // 2
            return [(0, cut), (cut, len(text))]

        finer = coarse.refine(1, in_two)
        assert len(finer.units) == len(coarse.units) + 1
        assert {text.strip() for text in seen} <= set(PROMPT_UNITS)

    def test_each_side_may_have_its_own(self, coarse):
        """As in `attribute`."""
        to = {"source": "word", "generated": "token"}
        finer = coarse.refine(2, to, side="both")
        added = [unit for unit in finer.units if unit not in coarse.units]
        source = [unit.text for unit in added if not unit.generated]
        generated = [unit.text for unit in added if unit.generated]
        assert all(" " not in text for text in source)
        assert any(text.startswith(" ") for text in generated)


class TestTheQuestion:
    """What was asked is asked again."""

    def test_of_another_span(self, cage, coarse, tokenizer):
        """As `explaining` says, also where it is split."""
        other = coarse.explaining(0)
        finer = other.refine(1)
        assert finer.explained == (0,)
        inp = TextTokenInput(PROMPT, tokenizer)
        fresh = cage.attribute(inp, TARGET, units=ranges_of(finer), explain=0)
        assert_same(finer, fresh)
        split = other.refine(1, side="generated")
        count = len(texts(coarse)[2].split())
        assert split.explained == tuple(range(count))
        assert texts(split)[-1] == ANSWER

    def test_with_a_foil(self, cage, tokenizer):
        """The stretch and its foil stay; its unit becomes the part that has it."""
        inp = TextTokenInput(PROMPT, tokenizer)
        foil = {"7": "9"}
        coarse = cage.attribute(inp, TARGET, units="sentence", foil=foil)
        for side in ("source", "generated", "both"):
            finer = coarse.refine(1, side=side)
            fresh = cage.attribute(inp, TARGET, units=ranges_of(finer), foil=foil)
            assert_same(finer, fresh)
            (unit,) = finer.explained
            assert finer.foils[0].unit == unit
            behind, expected = finer.graph.behind, fresh.graph.behind
            np.testing.assert_array_equal(behind.steps, expected.steps)
            np.testing.assert_allclose(
                behind.rows.toarray(), expected.rows.toarray(), atol=2e-5
            )
        assert finer.output_tokens[unit] == "7."

    def test_with_a_foil_among_other_explained_units(self, cage, tokenizer):
        """All of them stay explained."""
        inp = TextTokenInput(PROMPT, tokenizer)
        asked = {"foil": {"7": "9"}, "explain": slice(None)}
        coarse = cage.attribute(inp, TARGET, units="sentence", **asked)
        finer = coarse.refine(2, side="both")
        fresh = cage.attribute(inp, TARGET, units=ranges_of(finer), **asked)
        assert_same(finer, fresh)
        assert finer.explained == tuple(range(finer.graph.n_generated))

    def test_without_a_foil_that_was_left(self, cage, tokenizer):
        """A plain question about the same text has none."""
        inp = TextTokenInput(PROMPT, tokenizer)
        coarse = cage.attribute(inp, TARGET, units="sentence", foil={"7": "9"})
        plain = coarse.explaining(0)
        finer = plain.refine(1)
        assert finer.foils == ()
        fresh = cage.attribute(inp, TARGET, units=ranges_of(finer), explain=0)
        assert_same(finer, fresh)

    def test_cut_at_the_same_hops(self, cage, tokenizer):
        """And by the same tolerance and share of each row."""
        inp = TextTokenInput(PROMPT, tokenizer)
        asked = {"explain": -1, "hops": 0}
        coarse = cage.attribute(inp, TARGET, units="sentence", **asked)
        finer = coarse.refine(1)
        fresh = cage.attribute(inp, TARGET, units=ranges_of(finer), **asked)
        assert_same(finer, fresh)
        assert finer.unresolved == pytest.approx(fresh.unresolved)
        cut = cage.attribute(
            inp, TARGET, units="sentence", explain=-1, sparsify=0.9, tolerance=0.1
        ).refine(1)
        assert cut.meta["sparsify"] == 0.9
        assert cut.meta["tolerance"] == 0.1

    def test_with_as_many_draws(self, model, tokenizer):
        """The intervals of a random method are those of the finer units."""
        cage = GraphContextAttribution(
            LLMAttribution(ShapleyValueSampling(model), tokenizer)
        )
        inp = TextTokenInput(PROMPT, tokenizer)
        coarse = cage.attribute(
            inp, TARGET, units="sentence", explain=-1, draws=3, n_samples=2
        )
        finer = coarse.refine(1)
        assert finer.drawn.rows.shape[0] == 3
        assert len(finer.intervals(resamples=5).low) == finer.graph.n_sources

    def test_with_the_same_arguments_and_thoughts(self, model, tokenizer):
        """Those of the base method, and where thinking ends."""
        llm_attr = llm_attribution("integrated-gradients", model, tokenizer)
        cage = GraphContextAttribution(llm_attr, normalization="signed")
        inp = TextTokenInput(PROMPT, tokenizer)
        cut = TARGET.index(" The answer")
        coarse = cage.attribute(
            inp,
            TARGET,
            units="sentence",
            explain=Part.ANSWER,
            think=(0, cut),
            n_steps=2,
        )
        finer = coarse.refine(1)
        assert finer.graph.normalization == "signed"
        fresh = cage.attribute(
            inp, TARGET, units=ranges_of(finer), explain=-1, n_steps=2
        )
        assert_same(finer, fresh)
        assert finer.thinking == coarse.thinking
        assert 0.0 <= finer.share_through(Part.THINK) <= 1.0


class TestInputs:
    """Chats, traces, and features that are units as they are."""

    def test_messages_are_split_into_sentences_and_words(self, cage, tokenizer):
        """Role headers stay no part of any unit."""
        inp = ChatTokenInput(
            [{"role": "system", "content": "Read the text."}, MESSAGES[0]],
            tokenizer,
            features="all",
        )
        coarse = cage.attribute(inp, TARGET, units="message", explain=-1)
        assert coarse.graph.n_sources == 2
        finer = coarse.refine(2, "sentence")
        assert texts(finer)[:3] == ["Read the text.", *PROMPT_UNITS]
        fresh = cage.attribute(inp, TARGET, units=ranges_of(finer), explain=-1)
        assert_same(finer, fresh)
        finest = finer.refine(3, "word")
        fresh = cage.attribute(inp, TARGET, units=ranges_of(finest), explain=-1)
        assert_same(finest, fresh)

    def test_turns_of_a_trace_are_split_wherever_they_stand(self, model, tokenizer):
        """What a tool returned is a source; what the model wrote is not."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer), normalization="absolute"
        )
        inp = ChatTraceInput(MESSAGES, tokenizer)
        coarse = cage.attribute(inp, units="message", explain=-1)
        assert [unit.generated for unit in coarse.units] == [False, True, False, True]
        for side, top in (("source", 2), ("generated", 2), ("both", 4)):
            finer = coarse.refine(top, "sentence", side=side)
            assert len(finer.units) == 4 + top
            count = len(finer.explained)
            assert count == (1 if side == "source" else 2)
            fresh = cage.attribute(
                inp, units=ranges_of(finer), explain=slice(-count, None)
            )
            assert_same(finer, fresh)
        (outside,) = (
            unit
            for unit in coarse.refine(1, "sentence").units
            if unit in coarse.units and not unit.generated
        )
        heaviest = int(coarse.seq_attr.argmax())
        assert outside == coarse.units[[2, 0][heaviest]]

    def test_special_tokens_stay_alone(self, cage, tokenizer):
        """Also those within a range that was given."""
        ids = tokenizer.encode("Ana has 3 pens.<|end|>Mia has 4.")
        end = tokenizer.convert_tokens_to_ids("<|end|>")
        assert end in ids
        inp = TokenIdsInput(ids, tokenizer)
        length = len(tokenizer.decode(ids))
        coarse = cage.attribute(
            inp, TARGET, units={"source": [(0, length)], "generated": "sentence"}
        )
        assert coarse.graph.n_sources == 1
        finer = coarse.refine(1)
        sources = finer.units[: finer.graph.n_sources]
        assert [unit.text for unit in sources] == [
            *("Ana", "has", "3", "pens.", "<|end|>", "Mia", "has", "4."),
        ]
        assert [unit.text for unit in sources if unit.special] == ["<|end|>"]

    def test_units_end_where_a_message_does(self, cage, tokenizer):
        """Also within a range that was given, role headers between or not."""
        messages = [
            {"role": "user", "content": "Read the"},
            {"role": "user", "content": "text."},
        ]
        inp = ChatTokenInput(messages, tokenizer)
        whole = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        units = {
            "source": [(whole.index("Read"), whole.index("text.") + 5)],
            "generated": "sentence",
        }
        coarse = cage.attribute(inp, TARGET, units=units)
        assert coarse.graph.n_sources == 1
        finer = coarse.refine(1, "message")
        assert texts(finer)[:2] == ["Read the", "text."]

    def test_segments_and_parts_of_an_image_are_units_as_they_are(
        self, cage, tokenizer, vision_model
    ):
        """Generated text beside them can be split."""
        template = TextTemplateInput("{} has {}.", ["Ana Bo", "3 pens"])
        seeing = GraphContextAttribution(
            LLMAttribution(FeatureAblation(vision_model), tokenizer)
        )
        for asker, inp in ((cage, template), (seeing, image_input(tokenizer))):
            coarse = asker.attribute(inp, TARGET, units={"generated": "sentence"})
            with pytest.raises(
                ValueError, match="to: must divide a unit that has mass"
            ):
                coarse.refine(1)
            with pytest.raises(
                ValueError, match="to: must divide a unit that has mass"
            ):
                coarse.refine_cost(1)
            finer = coarse.refine(1, side="both")
            assert finer.units[:2] == coarse.units[:2]
            assert finer.graph.n_generated > coarse.graph.n_generated
            fresh = asker.attribute(
                inp, TARGET, units={"generated": ranges_of(finer)["generated"]}
            )
            assert_same(finer, fresh)

    def test_a_remote_model_is_asked_again(self, model, tokenizer, caplog):
        """Requests can be estimated and not counted."""
        remote = RemoteLLMAttribution(
            FeatureAblation(RemoteLLMAttribution.placeholder_model),
            tokenizer,
            LocalProvider(model, tokenizer),
        )
        cage = GraphContextAttribution(remote)
        inp = TextTokenInput(PROMPT, tokenizer)
        coarse = cage.attribute(inp, TARGET, units="sentence", explain=-1)
        with caplog.at_level(logging.INFO, logger="captum_cage.followup"):
            finer = coarse.refine(1)
        assert finer.meta["refined"]["sequences"] is None
        assert finer.meta["refined"]["estimated_sequences"] > 0
        assert "refining took None sequences" in caplog.text


class TestCost:
    """What it costs is told before and after."""

    def test_the_estimate_is_told_and_kept_to(self, coarse, caplog):
        """On the log, by `refine_cost` and with the result."""
        most = coarse.refine_cost(2, "word", side="both")
        with caplog.at_level(logging.INFO, logger="captum_cage.followup"):
            finer = coarse.refine(2, "word", side="both")
        told = finer.meta["refined"]
        assert told["units_before"] == len(coarse.units)
        assert told["estimated_sequences"] == most
        assert 0 < told["sequences"] <= most <= 3 * told["sequences"]
        before, after = caplog.messages
        count = len(finer.units)
        assert before == f"refining 4 units to {count} takes at most {most} sequences"
        assert after == f"refining took {told['sequences']} sequences"
        assert "refined" not in coarse.meta

    def test_asking_for_the_cost_asks_no_model(self, coarse, model):
        """It is counted by hand."""
        calls = []
        handle = model.model.register_forward_hook(lambda *_: calls.append(1))
        try:
            coarse.refine_cost()
            assert not calls
            coarse.refine()
            assert calls
        finally:
            handle.remove()

    def test_a_result_of_the_loop_is_refined_by_the_loop(self, model, tokenizer):
        """A model that suited no engine suits none now."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        inp = TextTokenInput(PROMPT, tokenizer)
        asked = {"units": "sentence", "explain": -1}
        loop = cage.attribute(inp, TARGET, strategy="loop", **asked)
        fused = cage.attribute(inp, TARGET, **asked)
        assert loop.refine_cost() > fused.refine_cost()
        assert loop.refine().meta["strategy"] == "loop"

    def test_a_base_method_that_is_not_listed_has_no_estimate(self, model, tokenizer):
        """It can be refined all the same."""

        class Mine(FeatureAblation):
            pass

        cage = GraphContextAttribution(LLMAttribution(Mine(model), tokenizer))
        inp = TextTokenInput(PROMPT, tokenizer)
        coarse = cage.attribute(inp, TARGET, units="sentence", explain=-1)
        assert coarse.refine_cost() is None
        told = coarse.refine().meta["refined"]
        assert told["estimated_sequences"] is None
        assert told["sequences"] > 0


class TestRefusals:
    """What cannot be refined is refused by name."""

    @pytest.mark.parametrize("ask", ["refine", "refine_cost"])
    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"top": 0}, ValueError, "top: must be 1 or more"),
            ({"top": 1.5}, TypeError, "top: must be a whole number"),
            ({"side": "left"}, ValueError, "side: must be one of 'source'"),
            ({"to": "letter"}, ValueError, "must be one of 'token', 'word'"),
            ({"to": [(0, 3)]}, ValueError, "to: must be a name or a function"),
            ({"to": {"source": [(0, 3)]}}, ValueError, "to: must be a name or"),
            ({"to": {"generated": [(0, 3)]}}, ValueError, "to: must be a name or"),
            (
                {"to": "sentence"},
                ValueError,
                "to: must divide .* 'sentence' divides none",
            ),
            (
                {"to": lambda text: [(0, len(text))]},
                ValueError,
                "a function divides none",
            ),
            ({"to": lambda _: ["x"]}, TypeError, "a range must be a pair"),
        ],
    )
    def test_arguments_are_checked(self, ask, arguments, error, match, coarse):
        """Before any model call."""
        with pytest.raises(error, match=match):
            getattr(coarse, ask)(**arguments)

    def test_units_without_mass_are_not_split(self, model, tokenizer):
        """There is nothing to be found in them."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        # The unknown token is the baseline: taking it away changes nothing.
        ids = [*tokenizer.encode("Ana has 3 pens."), 0, 0]
        inp = TokenIdsInput(ids, tokenizer)
        length = len(tokenizer.decode(ids[:-2]))
        whole = len(tokenizer.decode(ids))
        units = {"source": [(0, length), (length, whole)], "generated": "sentence"}
        coarse = cage.attribute(inp, TARGET, units=units, explain=-1)
        assert float(coarse.seq_attr[1]) == 0.0
        finer = coarse.refine(2, "token")
        assert finer.units[-3].text == tokenizer.decode([0, 0])

    def test_a_result_without_its_model_is_refused(self, coarse, tmp_path):
        """Loaded from a file, or copied to another process."""
        coarse.save(tmp_path / "result.npz")
        loaded = GraphAttributionResult.load(tmp_path / "result.npz")
        for result in (loaded, pickle.loads(pickle.dumps(coarse))):
            for ask in ("refine", "refine_cost", "alternatives"):
                with pytest.raises(
                    ValueError, match=f"{ask}: must ask the model again"
                ):
                    getattr(result, ask)()


class TestAlternatives:
    """What else the model might have written."""

    @staticmethod
    def probabilities(model: Any, tokenizer: Any, before: str) -> Any:
        """Of the next token after the prompt and some of the target."""
        ids = [
            *tokenizer.encode(PROMPT),
            *tokenizer.encode(before, add_special_tokens=False),
        ]
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)

    @pytest.mark.parametrize(
        ("position", "before"),
        [
            (0, ""),
            (-1, TARGET[: TARGET.index(" The answer")]),
            ("answer", TARGET[: TARGET.index(" answer")]),
        ],
    )
    def test_they_are_the_likeliest_next_tokens(
        self, position, before, coarse, model, tokenizer
    ):
        """At the first token of a unit or of a text, the likeliest first."""
        expected = self.probabilities(model, tokenizer, before)
        found = coarse.alternatives(position, k=4)
        order = expected.argsort(descending=True)[:4].tolist()
        assert [one.id for one in found] == order
        assert [one.probability for one in found] == pytest.approx(
            expected[order].tolist(), rel=1e-5
        )
        whole = tokenizer.encode(TARGET, add_special_tokens=False)
        place = len(tokenizer.encode(before, add_special_tokens=False))
        assert [one.written for one in found] == [i == whole[place] for i in order]
        every = coarse.alternatives(position, k=10_000)
        assert len(every) == len(expected)
        assert sum(one.probability for one in every) == pytest.approx(1.0)
        (written,) = (one for one in every if one.written)
        assert TARGET[len(before) :].startswith(written.text)

    def test_they_are_foils(self, cage, coarse, tokenizer):
        """By id."""
        other = next(one for one in coarse.alternatives("7") if not one.written)
        inp = TextTokenInput(PROMPT, tokenizer)
        result = cage.attribute(inp, TARGET, units="sentence", foil={"7": other.id})
        assert result.foils[0].text == other.text

    def test_the_model_is_left_as_it_was(self, cage, tokenizer, fresh_model):
        """In training mode, for example."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(fresh_model), tokenizer)
        )
        inp = TextTokenInput(PROMPT, tokenizer)
        result = cage.attribute(inp, TARGET, units="sentence")
        fresh_model.train()
        result.alternatives()
        result.refine(1)
        assert all(module.training for module in fresh_model.modules())

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"k": 0}, ValueError, "k: must be 1 or more"),
            ({"k": None}, TypeError, "k: must be a whole number"),
            ({"position": 2}, ValueError, "position: must be at least -2"),
            ({"position": 1.0}, TypeError, "position: must name a place"),
            ({"position": "18"}, ValueError, "'18' does not occur in the generated"),
        ],
    )
    def test_arguments_are_checked(self, arguments, error, match, coarse):
        """Before any model call."""
        with pytest.raises(error, match=match):
            coarse.alternatives(**arguments)


class TestRepeat:
    """The same question of the same text, asked anew."""

    @pytest.mark.parametrize("method", list(METHODS))
    def test_it_is_the_same_answer(self, method, model, tokenizer):
        """For each way to compute rows, and the cut too."""
        llm_attr = llm_attribution(method, model, tokenizer)
        cage = GraphContextAttribution(llm_attr, normalization="absolute")
        inp = TextTokenInput(PROMPT, tokenizer)
        result = cage.attribute(
            inp, TARGET, units="sentence", explain=-1, hops=1, **METHODS[method]
        )
        again = result.repeat()
        assert again is not result
        assert_same(again, result)
        assert again.meta == result.meta

    def test_all_rows_are_computed_again(self, coarse, model):
        """As the model is now, whatever was kept of the first answer."""
        calls = []
        handle = model.model.register_forward_hook(lambda *_: calls.append(1))
        try:
            coarse.repeat()
        finally:
            handle.remove()
        assert calls

    def test_a_changed_model_answers_otherwise(self, fresh_model, tokenizer):
        """And so does what it thinks of its own text."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(fresh_model), tokenizer)
        )
        inp = TextTokenInput(PROMPT, tokenizer)
        asked = {"units": "sentence", "explain": ANSWER}
        result = cage.attribute(inp, TARGET, **asked)
        with torch.no_grad():
            fresh_model.lm_head.weight.mul_(0.5)
        again = result.repeat()
        assert_same(again, cage.attribute(inp, TARGET, **asked))
        assert not np.allclose(again.graph.rows, result.graph.rows)
        assert not np.allclose(again.output_probs, result.output_probs, atol=0.0)

    def test_what_is_explained_is_what_the_result_explains(self, cage, tokenizer):
        """Not what was asked at first."""
        inp = TextTokenInput(PROMPT, tokenizer)
        result = cage.attribute(inp, TARGET, units="sentence")
        other = result.explaining(0)
        assert other.explained != result.explained
        fresh = cage.attribute(inp, TARGET, units="sentence", explain=0)
        again = other.repeat()
        assert again.explained == fresh.explained == other.explained
        np.testing.assert_allclose(again.seq_attr, other.seq_attr, atol=2e-5)
        assert_same(result.repeat(), result)

    def test_a_contrast_stays_one(self, cage, tokenizer):
        """With its foil, or without once something else is explained."""
        inp = TextTokenInput(PROMPT, tokenizer)
        result = cage.attribute(inp, TARGET, units="sentence", foil={"7": " 4"})
        assert result.foils
        assert_same(result.repeat(), result)
        other = result.explaining(0)
        again = other.repeat()
        assert again.explained == other.explained
        assert again.foils == other.foils

    def test_a_result_without_its_model_is_refused(self, coarse, tmp_path):
        """Loaded from a file, or copied to another process."""
        coarse.save(tmp_path / "result.npz")
        loaded = GraphAttributionResult.load(tmp_path / "result.npz")
        for result in (loaded, pickle.loads(pickle.dumps(coarse))):
            with pytest.raises(ValueError, match="repeat: must ask the model again"):
                result.repeat()
