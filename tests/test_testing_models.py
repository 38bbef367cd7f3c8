"""Small models and tokenizers: every family, every kind, and that they fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given

from captum_cage.testing import tiny_causal_lm, tiny_tokenizer
from captum_cage.testing.models import FAMILIES
from captum_cage.testing.strategies import hard_texts
from captum_cage.testing.tokenizers import VOCABULARY

KINDS = ("bpe", "byte", "char", "sentencepiece", "wordpiece")
TEXT = "Ana has 3 pens."


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_reads_and_writes(arch):
    """Finite logits for each token; as many new tokens as were asked for."""
    try:
        model = tiny_causal_lm(arch)
    except (ImportError, KeyError) as error:
        pytest.skip(f"this transformers has no {arch}: {error}")
    ids = torch.tensor([[5, 300, 600, 7]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert logits.shape == (1, 4, VOCABULARY)
    assert torch.isfinite(logits).all()
    assert not model.training
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False
    )
    assert written.shape == (1, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tokenizer_fits_every_model(kind):
    """What a model writes, each can read; all have one size."""
    tokenizer = tiny_tokenizer(kind)
    assert len(tokenizer) == VOCABULARY
    inputs = tokenizer(TEXT, return_tensors="pt")
    assert inputs.input_ids.max() < VOCABULARY
    every = tokenizer.decode(range(VOCABULARY))
    assert isinstance(every, str)
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXT}], tokenize=False
    ).endswith("<|end|>\n")


@pytest.mark.parametrize("kind", ["bpe", "byte"])
@given(text=hard_texts())
def test_bytes_give_any_text_back(kind, text):
    """Whatever its characters."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


TOKENIZERS = {kind: tiny_tokenizer(kind) for kind in KINDS}


def test_kinds_split_a_text_as_they_say():
    """Pieces, bytes, characters, words."""
    assert TOKENIZERS["byte"].encode("é!") == [
        TOKENIZERS["byte"].convert_tokens_to_ids(piece) for piece in ("Ã", "©", "!")
    ]
    assert TOKENIZERS["char"].tokenize("a b\n") == ["a", " ", "b", "\n"]
    assert TOKENIZERS["char"].decode(TOKENIZERS["char"].encode("a b\n")) == "a b\n"
    assert TOKENIZERS["wordpiece"].tokenize("Ana has")[-1] == "has"
    assert TOKENIZERS["sentencepiece"].encode("Ana")[0] == (
        TOKENIZERS["sentencepiece"].bos_token_id
    )


def test_fillers_are_ordinary_tokens_behind_the_others():
    """Named as in Gemma; without them a tokenizer is as small as it can be."""
    small = tiny_tokenizer("char", vocab_size=None)
    tokenizer = tiny_tokenizer("char", vocab_size=len(small) + 2)
    assert tokenizer.convert_ids_to_tokens([len(small), len(small) + 1]) == [
        "<unused0>",
        "<unused1>",
    ]
    assert tokenizer.encode(TEXT) == small.encode(TEXT)
    assert "<unused0>" not in tokenizer.all_special_tokens


def test_a_seed_gives_the_same_weights():
    """Another one gives others; the random state is left as it was."""
    before = torch.get_rng_state()
    one, same, other = (tiny_causal_lm(seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.lm_head.weight.detach().numpy() for model in (one, same, other)]
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


def test_sizes_and_types_are_as_asked():
    """Of the vocabulary, of the weights, and by the names of the config."""
    model = tiny_causal_lm(
        "gpt2", vocab_size=50, dtype=torch.float64, num_hidden_layers=1
    )
    assert model.get_input_embeddings().weight.shape == (50, 32)
    assert model.dtype == torch.float64
    assert len(model.transformer.h) == 1


def test_other_families_of_transformers_are_tried():
    """By the usual names of sizes; what fails says why, and what there is."""
    assert tiny_causal_lm("stablelm").config.num_hidden_layers == 2
    with pytest.raises(ValueError, match=r"arch: 'ctrl'.*gemma3") as caught:
        tiny_causal_lm("ctrl", n_layer=-1, num_attention_heads=0)
    assert caught.value.__cause__ is not None


def test_a_model_that_sees_later_tokens_is_refused():
    """It is no causal one, whatever transformers says."""
    with pytest.raises(ValueError, match="its logits depend on later tokens"):
        tiny_causal_lm("bert")


def test_what_is_asked_of_the_config_is_in_it():
    """An end token, too."""
    assert tiny_causal_lm(eos_token_id=5).config.eos_token_id == 5


def test_weights_do_not_depend_on_what_torch_is_set_to():
    """Default type and inference mode."""
    expected = tiny_causal_lm().state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            model = tiny_causal_lm()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    model(torch.tensor([[1, 2]])).logits.sum().backward()


def test_a_model_that_would_be_large_is_refused():
    """Before its weights are made."""
    with pytest.raises(ValueError, match=r"it would have [0-9]{8,} parameters"):
        tiny_causal_lm("git")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: tiny_causal_lm("no"), ValueError, "arch: must be one of 'llama', "),
        (lambda: tiny_causal_lm(seed=0.5), TypeError, "seed: must be a whole number"),
        (lambda: tiny_causal_lm(vocab_size=0), ValueError, "vocab_size: must be 1"),
        (
            lambda: tiny_tokenizer("no"),
            ValueError,
            "kind: must be one of 'bpe', 'byte'",
        ),
        (
            lambda: tiny_tokenizer("bpe", vocab_size=9),
            ValueError,
            "vocab_size: must be .* or more, but 9 came.* kind 'bpe' alone are",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, match):
    """With what there is."""
    with pytest.raises(error, match=match):
        call()
