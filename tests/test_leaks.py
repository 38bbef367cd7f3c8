"""Leaks: many explanations in one process leave nothing behind."""

import gc
import threading
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import transformers
from captum.attr import TextTokenInput

from captum_cage import GraphAttributionResult, GraphContextAttribution, scoring
from captum_cage.engines import verification
from captum_cage.methods import attention, blocks
from captum_cage.methods.catalogue import llm_attribution
from captum_cage.testing import tiny_causal_lm, tiny_tokenizer

METHODS = ("ablation", "gradient-x-activation", "attnlrp", "ifr")
MAPS = (scoring._holds, verification._verdicts, attention._checked, blocks._known)


def counts(model):
    """What must not grow."""
    gc.collect()
    found = {
        "hooks": sum(
            len(module._forward_hooks)
            + len(module._forward_pre_hooks)
            + len(module._backward_hooks)
            for module in model.modules()
        ),
        "attention functions": len(transformers.AttentionInterface._global_mapping),
        "weak maps": sum(map(len, MAPS)),
        "figures": len(plt.get_fignums()),
        "threads": threading.active_count(),
        "tensors": sum(type(one) is torch.Tensor for one in gc.get_objects()),
        "results": sum(type(one) is GraphAttributionResult for one in gc.get_objects()),
    }
    if (files := Path("/proc/self/fd")).is_dir():
        found["files"] = len(list(files.iterdir()))
    return found


@pytest.mark.parametrize("name", METHODS)
def test_explanations_leave_nothing_behind(name, tmp_path):
    """Twenty of them, with a page, a picture and a file; and one that is refused."""
    tokenizer = tiny_tokenizer("char")
    model = tiny_causal_lm(num_hidden_layers=1)
    cage = GraphContextAttribution(llm_attribution(name, model, tokenizer))

    def explain(number):
        inp = TextTokenInput("Ana"[: 2 + number % 2], tokenizer)
        result = cage.attribute(inp, " ha")
        if number % 10 == 0:
            result.to_html(tmp_path / "page.html")
            result.save(tmp_path / "result.npz")
            GraphAttributionResult.load(tmp_path / "result.npz")
            plt.close(result.plot_sources()[0])
        if number % 5 == 0:
            with pytest.raises(ValueError, match="does not occur"):
                cage.attribute(inp, " ha", explain="nowhere")

    for number in range(2):
        explain(number)
    before = counts(model)
    for number in range(20):
        explain(number)
    assert counts(model) == before


def test_models_are_not_kept():
    """What is known of a model goes with it."""
    tokenizer = tiny_tokenizer("char")

    def explain():
        model = tiny_causal_lm(num_hidden_layers=1)
        for name in METHODS:
            cage = GraphContextAttribution(llm_attribution(name, model, tokenizer))
            cage.attribute(TextTokenInput("Ana", tokenizer), " ha")

    explain()
    gc.collect()
    before = [len(one) for one in MAPS]
    explain()
    gc.collect()
    assert [len(one) for one in MAPS] == before
