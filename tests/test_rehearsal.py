"""Passes that are not made are written down, and what they take follows from others."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from captum_cage.causal import CausalModel
from captum_cage.rehearsal import Pass, Rehearsal
from tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    """A small model."""
    return CausalModel(tiny_model("llama", vocab_size=50))


def inputs(sequences, tokens):
    """Ids of a batch."""
    return {"input_ids": torch.ones((sequences, tokens), dtype=torch.long)}


class TestStandIn:
    """Who is asked in the model's place."""

    def test_one_pass_of_each_kind_is_made(self, model):
        """The very first kind twice, as it warms up what the others find warm."""
        rehearsal = Rehearsal(3)
        asked = rehearsal(model)
        keep = torch.arange(4)
        with torch.no_grad():
            found = [asked.states(inputs(2, 4), keep) for _ in range(4)]
            asked.states(inputs(2, 32), keep)
            asked.states(inputs(64, 32), keep)
        assert [one.shape[2] for one in found] == [32, 32, 1, 1]
        assert [one for one, _ in rehearsal.made] == [
            *[Pass(2, 4, 0, 4)] * 2,
            Pass(2, 32, 0, 4),
        ]
        assert rehearsal.skipped == [*[Pass(2, 4, 0, 4)] * 2, Pass(64, 32, 0, 4)]

    def test_made_passes_are_the_models(self, model):
        """Skipped ones give zeros."""
        asked = Rehearsal(1)(model)
        keep, targets = torch.arange(4), torch.tensor([1, 2, 3, 4])
        with torch.no_grad():
            plain = model.states(inputs(1, 4), keep)
            found = asked.states(inputs(1, 4), keep)
            assert torch.equal(plain, found)
            logs = asked.log_probabilities(found[0], targets)
            assert torch.equal(logs, model.log_probabilities(plain[0], targets))
            found = asked.states(inputs(1, 4), keep)
            assert not asked.log_probabilities(found[0], targets).any()

    def test_a_text_is_read_on_where_it_was_read(self, model):
        """All of its pieces are made, or none."""
        rehearsal = Rehearsal(2)
        asked = rehearsal(model)
        with torch.no_grad():
            for _ in range(3):
                cache = DynamicCache()
                asked.states(inputs(1, 4), torch.tensor([3]), cache=cache)
                asked.states(inputs(1, 9), torch.tensor([8]), cache=cache)
        assert [one.before for one, _ in rehearsal.made] == [0, 4]
        assert [one.before for one in rehearsal.skipped] == [0, 4, 0, 4]


class TestSeconds:
    """What the skipped passes would take."""

    def test_they_follow_from_a_start_and_tokens(self):
        """Where passes do, to rounding."""
        rehearsal = Rehearsal(3)
        shapes = [Pass(1, tokens) for tokens in (8, 8, 64, 512)]
        for one in shapes:
            seconds = 0.01 + 0.001 * one.tokens
            rehearsal.made.append((one, seconds))
        rehearsal.made[0] = (shapes[0], 9.0)  # cold
        rehearsal.skipped += [Pass(1, 128)] * 10
        assert rehearsal.seconds() == pytest.approx(1.38, rel=0.02)

    def test_nothing_skipped_takes_no_time(self):
        """And nothing made tells nothing."""
        rehearsal = Rehearsal(3)
        assert rehearsal.seconds() == 0.0
        rehearsal.skipped.append(Pass(1, 4, backward=True))
        assert rehearsal.seconds() == 0.0
