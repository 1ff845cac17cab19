"""A fused mixed operation and a plain one of the same state, and a step of each."""

import torch
from torch import nn

from nasfast.models.mixed_op import MixedOp, PlainMixedOp

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
MEMORIES = ("save", "recompute")


def make_pair(memory="save", channels=4, **options):
    """A fused and a plain operation in float64 with the same state, affine parameters drawn."""
    fused = MixedOp(channels, memory=memory, **options).double()
    plain = PlainMixedOp(channels, **options).double()
    for module in fused.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def step(op, x, weights, active=None, into=None):
    """Output, and gradients of state, weights, running sum and parameters, 0 if there is none."""
    leaves = [x, weights, *([] if into is None else [into]), *op.parameters()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    running = None if into is None else into * 1
    out = op(x, weights, active, into=running)
    cotangent = torch.ones_like(out).cumsum(-1).sin()
    if not out.requires_grad:  # where nothing but "none" runs
        return [out, *map(torch.zeros_like, leaves)]
    found = torch.autograd.grad(out, leaves, cotangent, materialize_grads=True)
    return [out.detach(), *found]


def assert_same(fused, plain):
    for ours, reference in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, reference, **CLOSE)


def assert_same_state(fused, plain):
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert_same(fused.state_dict().values(), plain.state_dict().values())
