"""The method and its engine keep the laws, and a value is right."""

import pytest
import torch
from captum.attr import LLMGradientAttribution
from gradient_norm import GradientNorm, gradient_norm_rows

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage.testing import (
    ENGINE_LAWS,
    METHOD_LAWS,
    check_attribution_method,
    check_engine,
    check_result,
)


@pytest.mark.parametrize("law", METHOD_LAWS)
def test_the_method_keeps_the_law(law):
    """One test per law, so that a report names it."""
    check_attribution_method(GradientNorm, laws=[law])


@pytest.mark.parametrize("law", ENGINE_LAWS)
def test_the_engine_keeps_the_law(law):
    """Equality to the loop among them."""
    check_engine(gradient_norm_rows, laws=[law])


def test_an_entry_is_the_length_of_a_gradient(tiny_causal_lm, tiny_tokenizer):
    """By hand, for one token: both fixtures come with captum-cage."""
    model, tokenizer = tiny_causal_lm("llama"), tiny_tokenizer("char")
    ids = tokenizer.encode("Ana has 3")
    llm_attr = LLMGradientAttribution(GradientNorm(model), tokenizer)
    inp = TokenIdsInput(ids[:-1], tokenizer)
    result = GraphContextAttribution(llm_attr).attribute(inp, ids[-1:])

    embeddings = model.get_input_embeddings()(torch.tensor([ids[:-1]])).detach()
    embeddings.requires_grad_()
    logits = model(inputs_embeds=embeddings).logits[0, -1]
    score = torch.log_softmax(logits, dim=-1)[ids[-1]]
    (gradient,) = torch.autograd.grad(score, embeddings)
    expected = gradient[0].norm(dim=-1)

    found = torch.tensor(result.graph.rows[0, : len(ids) - 1]).float()
    torch.testing.assert_close(found, expected)
    assert result.meta["strategy"] == "fused"
    check_result(result)
