"""What packed activations do to the weight gradient of an early layer, whose error has crossed the whole network.

In float64, where packing is the only error.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trady_triton import Policy, apply_plan
from trady_triton.bench.one_layer import plan_at

BATCH_SIZE = 4
IMAGE_SIZE = 112


def errors(name: str, image_size: int = IMAGE_SIZE) -> dict[str, tuple[float, float]]:
    """(relative error, cosine) of dW of the layer at 25 % depth, against exact activations, by the bits of packing."""
    model, x = awake_net(name, image_size), torch.randn(BATCH_SIZE, 3, image_size, image_size, dtype=torch.float64)
    calibrate(model, x)
    exact, *packed = (early_wgrad(model, x, activations) for activations in ("exact", 8, 2))
    return {
        bits: (float((found - exact).norm() / exact.norm()), float(F.cosine_similarity(found, exact, 0)))
        for bits, found in zip(("8", "2"), packed, strict=True)
    }


def awake_net(name: str, image_size: int) -> nn.Module:
    """A timm network in float64, random, in eval mode, whose normalisation scales by 0.5 to 1.5: zeros hide errors."""
    torch.manual_seed(0)
    sized = {"img_size": image_size} if name.startswith(("vit", "swin")) else {}
    model = timm.create_model(name, num_classes=5, **sized).double().eval()
    for module in model.modules():
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if key in ("running_var", "gamma", "weight") and tensor.dim() == 1:
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def calibrate(model: nn.Module, x: Tensor) -> None:
    """Give every BatchNorm the statistics of x: with those of an untrained net the signal dies on its way."""
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    model.eval()


def early_wgrad(model: nn.Module, x: Tensor, activations: str | int) -> Tensor:
    """The flat compact dW of every other channel of the layer at 25 % depth."""
    plan = plan_at(model, tuple(x.shape), 0.25)
    model = apply_plan(copy.deepcopy(model), replace(plan, policy=Policy(activations=activations)))
    slot = model.get_submodule(plan.pool[0]).slot
    slot.set(range(0, plan.shapes[plan.pool[0]].in_channels, 2))  # type: ignore[union-attr, operator]
    F.cross_entropy(model(x), torch.arange(len(x))).backward()
    grad: Tensor = slot.proxy.grad  # type: ignore[union-attr, assignment]
    return grad.flatten()
