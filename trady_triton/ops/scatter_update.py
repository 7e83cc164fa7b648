"""Fused optimizer step on the selected channels of many weights: one launch for all layers of one dtype.

O outputs, C inputs, G groups, K selected channels, L layers, E = O/G * R * S elements a channel. Weight l is [O, C/G,
*taps] (contiguous or channels_last), its gradient and states are compact: [K, O/G, *taps], contiguous. SGD and AdamW
as in torch.optim; states and arithmetic are fp32 (fp64 for fp64). Weight decay reaches only what is selected.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from trady_triton.ops.dispatch import jit, launch, tl, use_triton
from trady_triton.ops.library import register_op
from trady_triton.ops.philox import random16, random16_ref
from trady_triton.ops.select_config import Config
from trady_triton.ops.store import are_all
from trady_triton.ops.upload import upload

ALGORITHMS = ("sgd", "adamw")
HYPER_COLUMNS = 7
TABLE_COLUMNS = 13
BLOCK_K, BLOCK_E = 16, 64  # 16 channels share the 32-byte sectors of a weight row
CONFIG = Config({"BK": BLOCK_K, "BE": BLOCK_E}, num_warps=4, num_stages=1)  # not tuned: the tables depend on it

Tensors = Sequence[torch.Tensor]


def sgd_hyper(lr: float, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0) -> list[float]:
    """A row of `hyper` for SGD; pass dampening 0 in a first step: torch.optim starts its buffer with the gradient."""
    return [lr, momentum, dampening, weight_decay, 0.0, 1.0, 1.0]


def adamw_hyper(
    lr: float, step: int, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2
) -> list[float]:
    """A row of `hyper` for AdamW in its `step`-th step, counted from 1; `adamw_corrections` overrides the step."""
    correction1, correction2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    return [lr, *betas, weight_decay, eps, correction1, correction2**0.5]


def adamw_corrections(steps: torch.Tensor, betas: tuple[float, float]) -> torch.Tensor:
    """Bias corrections [sum K, 2] float64 of channels that were drawn at different times.

    steps: [sum K], how many steps each channel has made, this one included; the channels of all layers in their order.
    """
    decays = torch.tensor(betas, dtype=torch.float64, device=steps.device)
    corrections = 1 - decays ** steps.double()[:, None]
    corrections[:, 1].sqrt_()
    return corrections


@jit
def _round_to_bf16(value, seed, tile, row, layer, BK: tl.constexpr, BE: tl.constexpr):
    # adds 16 random bits below the bf16 mantissa and cuts them off; inf and nan stay what they are
    counter = tile * (BE // 8) + tl.arange(0, BE // 8)[None, :] + tl.zeros([BK, 1], tl.int32)
    noise = tl.reshape(random16(seed, counter, row[:, None], layer, 0), [BK, BE])
    bits = value.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = ((bits + noise) & -65536).to(tl.float32, bitcast=True)
    return tl.where(finite, rounded, value)


@jit
def _scatter_update_kernel(
    layers_ptr, blocks_ptr, grads_ptr, hyper_ptr, corrections_ptr, found_inf_ptr, seed_ptr, weight_ptr, grad_ptr,
    state_ptr, ids_ptr,
    ADAMW: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, STOCHASTIC: tl.constexpr,
    COMPUTE: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    # weight_ptr, grad_ptr, state_ptr and ids_ptr only carry the element types; addresses come from the tables
    if found_inf_ptr is not None:  # noqa: SIM102 - this is decided when compiling, the next when running
        if tl.load(found_inf_ptr) != 0.0:
            return
    layer = tl.load(blocks_ptr + tl.program_id(0).to(tl.int64) * 3)
    row = tl.load(blocks_ptr + tl.program_id(0).to(tl.int64) * 3 + 1) * BK + tl.arange(0, BK)
    tile = tl.load(blocks_ptr + tl.program_id(0).to(tl.int64) * 3 + 2)
    table = layers_ptr + layer.to(tl.int64) * 13
    w_base = tl.load(table).to(weight_ptr.dtype)
    ids = tl.load(table + 1).to(ids_ptr.dtype)
    K, E, taps = tl.load(table + 4), tl.load(table + 5), tl.load(table + 6)
    per_group, fan_in, so, sc, st = (
        tl.load(table + 7), tl.load(table + 8), tl.load(table + 9), tl.load(table + 10), tl.load(table + 11)
    )  # fmt: skip
    hyper = hyper_ptr + layer.to(tl.int64) * 7  # fp64, so that 1 - beta2 keeps its digits
    lr, first, second = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2)
    decay = tl.load(hyper + 3)

    e = tile.to(tl.int64) * BE + tl.arange(0, BE)
    mask = (row < K)[:, None] & (e < E)[None, :]
    channel = tl.load(ids + row, mask=row < K, other=0).to(tl.int64)
    start = channel // fan_in * per_group * so + channel % fan_in * sc
    w_at = w_base + start[:, None] + (e // taps * so + e % taps * st)[None, :]  # [BK, BE]
    at = row.to(tl.int64)[:, None] * E + e[None, :]
    w = tl.load(w_at, mask=mask, other=0.0).to(COMPUTE)
    grad = tl.load(tl.load(grads_ptr + layer).to(grad_ptr.dtype) + at, mask=mask, other=0.0).to(COMPUTE)
    if ADAMW:
        m_at = tl.load(table + 2).to(state_ptr.dtype) + at
        v_at = tl.load(table + 3).to(state_ptr.dtype) + at
        m = tl.load(m_at, mask=mask, other=0.0)
        v = tl.load(v_at, mask=mask, other=0.0)
        m = m + (1.0 - first).to(COMPUTE) * (grad - m)
        v = v * second.to(COMPUTE) + (1.0 - second).to(COMPUTE) * grad * grad
        tl.store(m_at, m, mask=mask)
        tl.store(v_at, v, mask=mask)
        if corrections_ptr is None:
            correction1, correction2 = tl.load(hyper + 5), tl.load(hyper + 6)
        else:
            of_row = corrections_ptr + (tl.load(table + 12) + row)[:, None] * 2
            correction1 = tl.load(of_row, mask=(row < K)[:, None], other=1.0)
            correction2 = tl.load(of_row + 1, mask=(row < K)[:, None], other=1.0)
        step_size = (lr / correction1).to(COMPUTE)
        denominator = tl.sqrt(v) / correction2.to(COMPUTE) + tl.load(hyper + 4).to(COMPUTE)
        w = w * (1.0 - lr * decay).to(COMPUTE) - step_size * m / denominator
    else:
        grad = grad + decay.to(COMPUTE) * w
        if MOMENTUM:
            m_at = tl.load(table + 2).to(state_ptr.dtype) + at
            m = tl.load(m_at, mask=mask, other=0.0)
            m = m * first.to(COMPUTE) + (1.0 - second).to(COMPUTE) * grad
            tl.store(m_at, m, mask=mask)
            grad = grad + first.to(COMPUTE) * m if NESTEROV else m
        w = w - lr.to(COMPUTE) * grad
    if STOCHASTIC:
        w = _round_to_bf16(w, tl.load(seed_ptr), tile, row, layer, BK, BE)
    tl.store(w_at, w.to(weight_ptr.dtype.element_ty), mask=mask)


def _tap_stride(weight: torch.Tensor) -> int:
    """The one stride between the kernel taps of a weight.

    Raises: ValueError when the taps do not lie at one stride.
    """
    sizes = [(size, step) for size, step in zip(weight.shape[2:], weight.stride()[2:], strict=True) if size > 1]
    if any(outer != size * inner for (_, outer), (size, inner) in itertools.pairwise(sizes)):
        raise ValueError(f"weight strides {weight.stride()}: wanted contiguous or channels_last taps")
    return sizes[-1][1] if sizes else 1


def _layer_row(weight: torch.Tensor, channels: torch.Tensor, states: Tensors) -> list[int]:
    """Address and geometry of one layer; the number of groups follows from the compact shape [K, O/G, *taps]."""
    taps = weight[0, 0].numel()
    groups = max(1, weight.shape[0] // states[0].shape[1])
    pointers = [weight.data_ptr(), channels.data_ptr()]
    pointers += [state.data_ptr() for state in states[1:]] + [0] * (3 - len(states))
    per_group = weight.shape[0] // groups
    geometry = [channels.numel(), per_group * taps, taps, per_group, weight.shape[1]]
    return pointers + geometry + [weight.stride(0), weight.stride(1), _tap_stride(weight)]


def update_tables(
    weights: Tensors, grads: Tensors, channels: Tensors, momenta: Tensors = (), variances: Tensors = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layers [L, 13] int64, blocks [B, 3] int32) on the weights' device: addresses, geometry, and who updates what.

    They stay valid until a weight, an index or a state moves: build them once a resample. Of `grads` the shapes matter.
    """
    groups = zip(*(tensors for tensors in (grads, momenta, variances) if tensors), strict=True)
    rows = [_layer_row(w, c, states) for w, c, states in zip(weights, channels, groups, strict=True)]
    first_channels = itertools.accumulate((row[4] for row in rows), initial=0)
    rows = [[*row, first] for row, first in zip(rows, first_channels, strict=False)]
    blocks = [
        (layer, i, tile)
        for layer, row in enumerate(rows)
        for i in range(-(-row[4] // BLOCK_K))
        for tile in range(-(-row[5] // BLOCK_E))
    ]
    device = weights[0].device
    return upload(rows, torch.int64, device), upload(blocks, torch.int32, device).view(-1, 3)


def _sgd_ref(
    w: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor | None, hyper: list[float], nesterov: bool
) -> None:
    lr, beta, dampening, decay = hyper[:4]
    if decay:
        grad = grad.add(w, alpha=decay)
    if momentum is not None:
        momentum.mul_(beta).add_(grad, alpha=1 - dampening)
        grad = grad.add(momentum, alpha=beta) if nesterov else momentum
    w.add_(grad, alpha=-lr)


def _adamw_ref(
    w: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, hyper: list[float],
    corrections: torch.Tensor | None,
) -> None:  # fmt: skip
    lr, beta1, beta2, decay, eps, correction1, correction2 = hyper
    w.mul_(1 - lr * decay)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if corrections is None:
        w.addcdiv_(m, (v.sqrt() / correction2).add_(eps), value=-lr / correction1)
        return
    by_channel = corrections.to(w.device).view(-1, 2, *[1] * (w.dim() - 1))
    step_size, correction = (-lr / by_channel[:, 0]).to(w.dtype), by_channel[:, 1].to(w.dtype)
    w.addcdiv_(m * step_size, (v.sqrt() / correction).add_(eps))


def _stochastic_bf16_ref(w: torch.Tensor, seed: torch.Tensor, layer: int) -> torch.Tensor:
    rows = w.flatten(1)
    counter = torch.arange(-(-rows.shape[1] // 8), device=w.device).expand(rows.shape[0], -1)
    row = torch.arange(rows.shape[0], device=w.device)[:, None]
    noise = random16_ref(seed, counter, row, layer, 0).flatten(1)[:, : rows.shape[1]]
    cut = ((rows.contiguous().view(torch.int32) + noise.int()) & -65536).view(torch.float32)
    return torch.where(rows.isfinite(), cut, rows).view_as(w)


def scatter_update_ref(
    weights: Tensors, grads: Tensors, channels: Tensors, hyper: torch.Tensor, momenta: Tensors = (),
    variances: Tensors = (), algorithm: str = "sgd", nesterov: bool = False, found_inf: torch.Tensor | None = None,
    seed: torch.Tensor | None = None, tables: Tensors = (), corrections: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """What `scatter_update_` computes, layer by layer in torch."""
    if found_inf is not None and found_inf.item():
        return
    counts = [ids.numel() for ids in channels]
    by_layer = [None] * len(counts) if corrections is None else corrections.split(counts)
    for layer, (weight, grad, ids, row) in enumerate(zip(weights, grads, channels, hyper.tolist(), strict=True)):
        by_channel = weight.unflatten(0, (-1, grad.shape[1])).transpose(1, 2)  # a view [G, C/G, O/G, *taps]
        at = (ids.long() // weight.shape[1], ids.long() % weight.shape[1])
        whole = are_all(ids, by_channel.shape[0] * by_channel.shape[1])
        rows = by_channel.flatten(0, 1) if whole else by_channel[at]  # [K, O/G, *taps]
        w, grad = rows.to(_compute_dtype(weight)), grad.to(_compute_dtype(weight))
        if whole and grad.shape[1] == grad[0].numel() == weight.shape[0]:  # a transposed matrix: turned at once
            grad = grad.flatten(1).t().contiguous().t().view_as(grad)
        if algorithm == "adamw":
            _adamw_ref(w, grad, momenta[layer], variances[layer], row, by_layer[layer])
        else:
            _sgd_ref(w, grad, momenta[layer] if momenta else None, row, nesterov)
        w = w if seed is None else _stochastic_bf16_ref(w, seed, layer)
        if w.data_ptr() != weight.data_ptr():  # else it was updated in place
            by_channel[at] = w.to(weight.dtype)


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _update(
    weights: Tensors, grads: Tensors, channels: Tensors, hyper: torch.Tensor, momenta: Tensors, variances: Tensors,
    algorithm: str, nesterov: bool, found_inf: torch.Tensor | None, seed: torch.Tensor | None, tables: Tensors,
    corrections: torch.Tensor | None,
) -> None:  # fmt: skip
    if not use_triton(weights[0]):
        scatter_update_ref(
            weights, grads, channels, hyper, momenta, variances, algorithm, nesterov, found_inf, seed, (), corrections
        )  # fmt: skip
        return
    layers, blocks = tables or update_tables(weights, grads, channels, momenta, variances)
    if not len(blocks):
        return
    device, compute = weights[0].device, _compute_dtype(weights[0])
    pointers = upload([grad.data_ptr() for grad in grads], torch.int64, device)
    carrier = weights[0].new_empty(1, dtype=compute)
    launch(
        _scatter_update_kernel, (len(blocks),), layers, blocks, pointers, upload(hyper, torch.float64, device),
        None if corrections is None else upload(corrections, torch.float64, device),
        found_inf, seed, weights[0], grads[0], carrier, channels[0], config=CONFIG, ADAMW=algorithm == "adamw",
        MOMENTUM=bool(momenta), NESTEROV=nesterov, STOCHASTIC=seed is not None,
        COMPUTE=tl.float64 if compute == torch.float64 else tl.float32,
    )  # fmt: skip
    torch.autograd.graph.increment_version([*weights, *momenta, *variances])


def _fake(*arguments: object) -> None:
    return None


_op = register_op(
    "scatter_update_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] channels, Tensor hyper, Tensor(b!)[] momenta, "
    "Tensor(c!)[] variances, str algorithm, bool nesterov, Tensor? found_inf, Tensor? seed, Tensor[] tables, "
    "Tensor? corrections) -> ()",
    _update,
    _fake,
)


def scatter_update_(
    weights: Tensors, grads: Tensors, channels: Tensors, hyper: torch.Tensor, momenta: Tensors = (),
    variances: Tensors = (), algorithm: str = "sgd", nesterov: bool = False, found_inf: torch.Tensor | None = None,
    seed: torch.Tensor | None = None, tables: Tensors = (), corrections: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Update the selected channels of every weight in place.

    All weights share a device and a dtype, so do the gradients.
    algorithm: "sgd" (with momentum when `momenta` are given) or "adamw".
    hyper: [L, 7] float64, rows by `sgd_hyper` or `adamw_hyper`.
    found_inf: a flag of one element that, when not zero, turns the update into a no-op.
    seed: int64 of one element, a new one each step; rounds bf16 weights stochastically.
    tables: what `update_tables` returned for these tensors; built here when absent.
    corrections: [sum K, 2] float64 by `adamw_corrections`, where the channels have made different numbers of steps.
    Raises: ValueError when lists, shapes or dtypes do not fit.
    """
    if not weights:
        return
    _check(weights, grads, channels, hyper, momenta, variances, algorithm, seed)
    _check_corrections(corrections, sum(ids.numel() for ids in channels))
    _op(weights, grads, channels, hyper, momenta, variances, algorithm, nesterov, found_inf, seed, tables, corrections)


def _check(
    weights: Tensors, grads: Tensors, channels: Tensors, hyper: torch.Tensor, momenta: Tensors, variances: Tensors,
    algorithm: str, seed: torch.Tensor | None,
) -> None:  # fmt: skip
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: got {algorithm!r}, wanted one of {', '.join(ALGORITHMS)}")
    if algorithm == "adamw" and not (momenta and variances):
        raise ValueError("adamw: wanted momenta and variances, one of each a layer")
    if tuple(hyper.shape) != (len(weights), HYPER_COLUMNS) or hyper.dtype != torch.float64:
        raise ValueError(
            f"hyper: got {tuple(hyper.shape)} {hyper.dtype}, wanted ({len(weights)}, {HYPER_COLUMNS}) float64"
        )
    if seed is not None and weights[0].dtype != torch.bfloat16:
        raise ValueError(f"stochastic rounding: got {weights[0].dtype} weights, wanted bfloat16")
    _check_uniform("weights", weights, len(weights), weights[0].dtype)
    _check_uniform("grads", grads, len(weights), grads[0].dtype)
    _check_uniform("channels", channels, len(weights), channels[0].dtype)
    for name, states in (("momenta", momenta), ("variances", variances)):
        if states:
            _check_uniform(name, states, len(weights), _compute_dtype(weights[0]))
    for i, (weight, grad, ids) in enumerate(zip(weights, grads, channels, strict=True)):
        if grad.shape[0] != ids.numel() or grad.shape[2:] != weight.shape[2:] or weight.shape[0] % grad.shape[1]:
            raise ValueError(
                f"layer {i}: weight {tuple(weight.shape)} and {ids.numel()} channels want a gradient "
                f"[K, O/G, *taps], got {tuple(grad.shape)}"
            )


def _check_corrections(corrections: torch.Tensor | None, count: int) -> None:
    if corrections is not None and (tuple(corrections.shape) != (count, 2) or corrections.dtype != torch.float64):
        raise ValueError(
            f"corrections: got {tuple(corrections.shape)} {corrections.dtype}, wanted ({count}, 2) float64"
        )


def _check_uniform(name: str, tensors: Tensors, length: int, dtype: torch.dtype) -> None:
    if len(tensors) != length or any(tensor.dtype != dtype for tensor in tensors):
        raise ValueError(f"{name}: got {[str(t.dtype) for t in tensors]}, wanted {length} tensors of {dtype}")
    if name != "weights" and not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"{name}: wanted contiguous tensors")


def update_flops(num_elements: int, algorithm: str, momentum: bool = False) -> int:
    """Additions and multiplications of one step over `num_elements` selected weights."""
    return num_elements * (15 if algorithm == "adamw" else 6 if momentum else 4)


def update_bytes(num_elements: int, weight_size: int, grad_size: int, num_states: int, state_size: int = 4) -> int:
    """Bytes of one step: weights and states read and written, gradients read; sectors around weights not counted."""
    return num_elements * (2 * weight_size + grad_size + 2 * num_states * state_size)
