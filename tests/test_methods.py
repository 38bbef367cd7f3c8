"""What the base methods of this package have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import LLMAttribution, LLMGradientAttribution, TextTokenInput

from captum_cage import GraphContextAttribution, TokenIdsInput, methods
from captum_cage.inputs import token_features
from captum_cage.methods import IFR, AttentionSuppression, MeanAttention
from tiny import image_input, inputs_of_each_kind, tiny_model, tiny_tokenizer

PROMPT = "Ana has 3 pens. How many?"
WITH_TOKENS = ("tokens", "tokens, some skipped", "ids", "ids in groups", "chat")


@pytest.fixture(scope="module")
def small():
    """A small model."""
    return tiny_model("llama", vocab_size=len(tiny_tokenizer()))


class TestNames:
    """What the folder offers."""

    def test_every_method_names_its_paper(self):
        """A class that declares what it takes says where it comes from."""
        for name in methods.__all__:
            method = getattr(methods, name)
            if getattr(method, "capability", None) is not None:
                assert "Source: " in method.__doc__, name

    @pytest.mark.parametrize("method", [IFR, AttentionSuppression, MeanAttention])
    def test_what_is_no_pytorch_model_is_refused_by_name(self, method):
        """Before anything is wrapped."""
        with pytest.raises(
            TypeError, match=f"{method.__name__}: reads the inside of a PyTorch model"
        ):
            method(lambda ids: ids)


class TestTokenFeatures:
    """Ids of an input, and the feature of each."""

    @pytest.mark.parametrize("kind", WITH_TOKENS)
    def test_hiding_a_feature_changes_its_tokens_and_no_others(self, kind):
        """What the input itself replaces is what it is said to be made of."""
        inp = inputs_of_each_kind(tiny_tokenizer(), PROMPT)[kind]
        ids, feature_of_token = token_features(inp)
        assert ids == inp.to_model_input()[0].tolist()
        assert feature_of_token.max() + 1 == inp.n_itp_features
        if not isinstance(inp, TokenIdsInput):  # Captum's takes ids, with 0 for absent
            assert np.flatnonzero(feature_of_token >= 0).tolist() == [
                i for i in range(len(ids)) if inp.itp_mask is None or inp.itp_mask[0, i]
            ]
            return
        for feature in range(inp.n_itp_features):
            present = inp.to_tensor()
            present[0, feature] = 0
            changed = inp.to_model_input(present)[0].numpy() != np.array(ids)
            assert changed.any()
            assert not changed[feature_of_token != feature].any()

    def test_templates_and_images_are_refused_by_name(self, small):
        """Their features are no tokens."""
        tokenizer = tiny_tokenizer()
        inputs = inputs_of_each_kind(tokenizer, PROMPT)
        refused = [inp for kind, inp in inputs.items() if kind not in WITH_TOKENS]
        for inp in [*refused, image_input(tokenizer)]:
            with pytest.raises(TypeError, match=f"but {type(inp).__name__} came"):
                token_features(inp)
            cage = GraphContextAttribution(
                LLMAttribution(AttentionSuppression(small), tokenizer)
            )
            with pytest.raises(TypeError, match="AttentionSuppression attributes to"):
                cage.attribute(inp, " Ana has")


class TestWithoutTheGraph:
    """Captum's own objects take them."""

    def test_a_token_method_gives_one_row_per_target(self, small):
        """As any gradient method does, over the features that the input has."""
        tokenizer = tiny_tokenizer()
        inp = inputs_of_each_kind(tokenizer, PROMPT)["tokens, some skipped"]
        target = torch.tensor(tokenizer.encode(" Ana has"))
        found = LLMGradientAttribution(IFR(small), tokenizer).attribute(
            inp, target=target
        )
        assert found.token_attr.shape == (len(target), inp.n_itp_features)
        ids = torch.cat([inp.inp_tensor[0], target[:-1]])
        rows = IFR(small).rows(ids, target)[:, : inp.inp_tensor.shape[1]]
        np.testing.assert_allclose(
            found.token_attr, rows[:, inp.itp_mask[0]], rtol=1e-5, atol=1e-6
        )

    def test_a_unit_method_gives_the_sum_and_each_target(self, small):
        """As any perturbation method does."""
        tokenizer = tiny_tokenizer()
        inp = TextTokenInput(PROMPT, tokenizer)
        target = torch.tensor(tokenizer.encode(" Ana has"))
        found = LLMAttribution(AttentionSuppression(small), tokenizer).attribute(
            inp, target=target
        )
        assert found.token_attr.shape == (len(target), inp.n_itp_features)
        torch.testing.assert_close(found.seq_attr, found.token_attr.sum(0))
