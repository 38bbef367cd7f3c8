"""A model is as it was found, whatever was set meanwhile and not undone."""

import functools

import torch
from torch import nn

from captum_cage._restored import AsFound, evaluated
from captum_cage.testing import tiny_causal_lm
from captum_cage.testing.watch import changes, model_snapshot, settings_snapshot


def ours(*_args, **_kwargs):
    """A hook of this package."""


ours.__module__ = "captum_cage.engines.gradient"


def theirs(*_args, **_kwargs):
    """A hook of somebody else."""


def snapshot(model):
    """All that is to be as before."""
    return {**model_snapshot(model), **settings_snapshot()}


def test_what_was_left_behind_is_undone():
    """Modes, flags, hooks, the attention implementation, the gradient mode."""
    model = tiny_causal_lm(num_hidden_layers=1).train()
    model.model.norm.eval().weight.requires_grad_(False)
    model.lm_head.register_forward_hook(ours)  # there before: not this call's
    before = snapshot(model)
    found = AsFound(model)
    with found:
        model.eval()
        model.model.norm.train()
        model.requires_grad_(False)
        model.model.norm.weight.requires_grad_(True)
        model.lm_head.register_forward_pre_hook(ours, with_kwargs=True)
        model.model.register_forward_hook(functools.partial(ours, 1), always_call=True)
        model.model.norm.register_full_backward_hook(ours)
        model.config._attn_implementation = "eager"
        torch.set_grad_enabled(False)
    assert changes(before, snapshot(model)) == []
    assert not model.lm_head._forward_pre_hooks_with_kwargs
    assert not model.model._forward_hooks_always_called


def test_flags_of_weights_that_were_exchanged_are_undone():
    """As accelerate does at each pass."""
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with AsFound(model):
        model.requires_grad_(False)
        for name, parameter in list(model.named_parameters()):
            setattr(model, name, nn.Parameter(parameter.detach(), requires_grad=False))
    assert model.weight.requires_grad
    assert not model.bias.requires_grad


def test_hooks_of_others_stay():
    """Somebody may have set them meanwhile, to stay."""
    model = nn.Linear(2, 2)
    with AsFound(model):
        model.register_forward_hook(theirs)
        model.register_forward_hook(ours)
    assert list(model._forward_hooks.values()) == [theirs]


def test_a_model_is_evaluated_inside():
    """And trains on afterwards; what is no module is let alone."""
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with evaluated(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]
    with evaluated("a remote model"):
        pass
