"""The fused update does to the selected channels what torch.optim does, and nothing to the others."""

import pytest
import torch
from torch.library import opcheck

from trady_triton.ops.scatter_update import (
    adamw_corrections,
    adamw_hyper,
    scatter_update_,
    scatter_update_ref,
    sgd_hyper,
    update_tables,
)

SHAPES = [
    ((24, 40), 1),
    ((12, 18, 3, 3), 1),
    ((70, 20, 1, 1), 1),
    ((16, 1, 5, 5), 16),
    ((12, 4, 3, 3), 3),
    ((8, 3, 2), 1),
]


def layers(generator, dtype=torch.float32, fraction=0.4):
    """weights, compact gradients [K, O/G, *taps] and channels; every other conv is channels_last."""
    weights, grads, channels = [], [], []
    for i, (shape, groups) in enumerate(SHAPES):
        weight = torch.randn(shape, generator=generator).to(dtype)
        weights.append(weight.contiguous(memory_format=torch.channels_last) if i % 2 and len(shape) == 4 else weight)
        C = shape[1] * groups
        K = max(1, round(C * fraction))
        channels.append(torch.randperm(C, generator=generator)[:K].sort().values.int())
        grads.append(torch.randn(K, shape[0] // groups, *shape[2:], generator=generator))
    return weights, grads, channels


def dense(grad, ids, weight):
    """The gradient as the weight has it: zero where nothing is selected (a plain loop)."""
    full = torch.zeros_like(weight, dtype=grad.dtype)
    per_group, fan_in = grad.shape[1], weight.shape[1]
    for k, c in enumerate(ids.tolist()):
        g = c // fan_in
        full[g * per_group : (g + 1) * per_group, c % fan_in] = grad[k]
    return full


def hyper_rows(rows):
    return torch.tensor(rows, dtype=torch.float64)


def states(grads, count, dtype=torch.float32):
    return [[torch.zeros_like(grad, dtype=dtype) for grad in grads] for _ in range(count)]


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}, 0),
    "sgd-decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}, 0),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, 1),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, 1),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 1),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}, 2),
}


def hyper_row(name, options, step):
    if name == "adamw":
        return adamw_hyper(options["lr"], step, options["betas"], 1e-8, options["weight_decay"])
    dampening = 0.0 if step == 1 else options.get("dampening", 0.0)
    return sgd_hyper(options["lr"], options.get("momentum", 0.0), dampening, options.get("weight_decay", 0.0))


def train(name, update, weights, channels, steps, count, options):
    """Three steps of `update` on copies of the weights."""
    weights = [weight.clone() for weight in weights]
    momenta, variances = ([*states(steps[0], count, _state_dtype(weights)), [], []])[:2]
    for step, grads in enumerate(steps, 1):
        hyper = hyper_rows([hyper_row(name, options, step)] * len(weights))
        algorithm = "adamw" if name == "adamw" else "sgd"
        update(weights, grads, channels, hyper, momenta, variances, algorithm, options.get("nesterov", False))
    return weights


def _state_dtype(weights):
    return torch.float64 if weights[0].dtype == torch.float64 else torch.float32


def torch_train(make, options, weights, channels, steps):
    """torch.optim on the dense weights, with zero gradients where nothing is selected."""
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = make(params, **options, foreach=False)
    for grads in steps:
        for p, grad, ids in zip(params, grads, channels, strict=True):
            p.grad = dense(grad.to(p.dtype), ids, p)
        optimizer.step()
    return [p.detach() for p in params]


def everything(weights):
    return [torch.arange(w.shape[1] * g, dtype=torch.int32) for w, (_, g) in zip(weights, SHAPES, strict=True)]


def full_steps(generator, count=3, dtype=torch.float32):
    weights, _, _ = layers(generator, dtype)
    shapes = [(w.shape[1] * g, w.shape[0] // g, *w.shape[2:]) for w, (_, g) in zip(weights, SHAPES, strict=True)]
    steps = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(count)]
    return weights, everything(weights), steps


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twin_equals_torch_optim_bit_for_bit_when_everything_is_selected(name, generator):
    make, options, count = OPTIMIZERS[name]
    weights, channels, steps = full_steps(generator)
    ours = train(name, scatter_update_ref, weights, channels, steps, count, options)
    for w, reference in zip(ours, torch_train(make, options, weights, channels, steps), strict=True):
        assert torch.equal(w, reference)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kernel_equals_torch_optim_in_double_when_everything_is_selected(name, generator):
    make, options, count = OPTIMIZERS[name]
    weights, channels, steps = full_steps(generator)
    ours = train(name, scatter_update_, weights, channels, steps, count, options)
    reference = torch_train(make, options, [w.double() for w in weights], channels, steps)
    for w, ref in zip(ours, reference, strict=True):
        assert (w - ref).abs().max() <= 2e-6 * ref.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_kernel_equals_twin_in_other_weight_dtypes(name, dtype, generator):
    _, options, count = OPTIMIZERS[name]
    weights, channels, steps = full_steps(generator, 2, dtype)
    ours = train(name, scatter_update_, weights, channels, steps, count, options)
    twin = train(name, scatter_update_ref, weights, channels, steps, count, options)
    for w, ref in zip(ours, twin, strict=True):
        torch.testing.assert_close(w, ref, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("update", [scatter_update_, scatter_update_ref])
def test_other_channels_keep_their_bits(update, generator):
    weights, grads, channels = layers(generator)
    before = [w.clone() for w in weights]
    update(weights, grads, channels, hyper_rows([sgd_hyper(0.5, weight_decay=0.1)] * len(weights)))
    for w, old, grad, ids in zip(weights, before, grads, channels, strict=True):
        touched = dense(torch.ones_like(grad), ids, w).bool()
        assert torch.equal(w[~touched], old[~touched])
        assert (w[touched] != old[touched]).all()


@pytest.mark.parametrize("update", [scatter_update_, scatter_update_ref])
def test_found_inf_turns_the_step_into_a_no_op(update, generator):
    weights, grads, channels = layers(generator)
    before = [w.clone() for w in weights]
    momenta = states(grads, 1)[0]
    hyper = hyper_rows([sgd_hyper(0.5, 0.9)] * len(weights))
    update(weights, grads, channels, hyper, momenta, found_inf=torch.ones(1))
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))
    assert not any(m.any() for m in momenta)
    update(weights, grads, channels, hyper, momenta, found_inf=torch.zeros(1))
    assert not any(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


def test_stochastic_rounding_has_the_bits_of_the_twin(generator):
    weights, grads, channels = layers(generator, torch.bfloat16)
    twin = [w.clone() for w in weights]
    hyper, seed = hyper_rows([sgd_hyper(1e-3)] * len(weights)), torch.tensor([2**40 + 7])
    scatter_update_(weights, grads, channels, hyper, seed=seed)
    scatter_update_ref(twin, grads, channels, hyper, seed=seed)
    assert all(torch.equal(w, ref) for w, ref in zip(weights, twin, strict=True))


def test_stochastic_rounding_is_unbiased():
    """w = 1, update 2^-10: an eighth of the bf16 step 2^-7, lost by nearest rounding; the mean must move by 2^-10."""
    weight = torch.ones(256, 64, dtype=torch.bfloat16)
    hyper, grad = hyper_rows([sgd_hyper(1.0)]), torch.full((64, 256), -(2.0**-10))
    scatter_update_ref([weight], [grad], [torch.arange(64)], hyper, seed=torch.tensor([11]))
    moved = (weight.double() - 1) * 2**10
    assert abs(moved.mean() - 1) < 4 * moved.std() / 128
    assert moved.unique().tolist() == [0.0, 8.0]


def test_prebuilt_tables_give_the_same_update(generator):
    weights, grads, channels = layers(generator)
    copies = [w.clone() for w in weights]
    hyper = hyper_rows([sgd_hyper(0.1)] * len(weights))
    scatter_update_(weights, grads, channels, hyper, tables=update_tables(weights, grads, channels))
    scatter_update_(copies, grads, channels, hyper)
    assert all(torch.equal(w, copy) for w, copy in zip(weights, copies, strict=True))


def test_rows_of_hyper_belong_to_layers(generator):
    weights = [torch.zeros(4, 3), torch.zeros(4, 3)]
    grads = [torch.ones(1, 4), torch.ones(1, 4)]
    scatter_update_(weights, grads, [torch.tensor([1])] * 2, hyper_rows([sgd_hyper(1.0), sgd_hyper(0.25)]))
    assert weights[0][:, 1].tolist() == [-1.0] * 4
    assert weights[1][:, 1].tolist() == [-0.25] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("update", [scatter_update_, scatter_update_ref])
def test_every_channel_has_its_own_number_of_adamw_steps(update, dtype, generator):
    """All channels of two layers at once, or each alone with the step of its own: the same weights."""
    weights, grads, channels = layers(generator, dtype)
    grads = [grad.to(dtype) for grad in grads]
    steps = [torch.arange(1, ids.numel() + 1) * 3 % 7 + 1 for ids in channels]
    momenta, variances = ([0.1 * grad**k for grad in grads] for k in (1, 2))
    alone = [[t.clone() for t in tensors] for tensors in (weights, momenta, variances)]
    options = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    corrections = adamw_corrections(torch.cat(steps), options["betas"])
    hyper = hyper_rows([adamw_hyper(0.01, 1, **options)] * len(weights))
    update(weights, grads, channels, hyper, momenta, variances, "adamw", corrections=corrections)
    for layer, counts in enumerate(steps):
        weight, m, v = (tensors[layer] for tensors in alone)
        for k, step in enumerate(counts.tolist()):
            row = slice(k, k + 1)
            parts = [weight], [grads[layer][row]], [channels[layer][row]]
            scatter_update_ref(*parts, hyper_rows([adamw_hyper(0.01, step, **options)]), [m[row]], [v[row]], "adamw")
        bound = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(weights[layer], weight, rtol=bound, atol=bound)
        torch.testing.assert_close(variances[layer], v, rtol=bound, atol=bound)


def test_empty_layers_are_left_alone():
    weight = torch.ones(4, 3)
    scatter_update_([weight], [torch.ones(0, 4)], [torch.arange(0)], hyper_rows([sgd_hyper(1.0)]))
    assert weight.eq(1).all()


def test_update_raises_the_version_of_the_weight():
    weight = torch.ones(4, 3)
    scatter_update_([weight], [torch.ones(1, 4)], [torch.tensor([2])], hyper_rows([sgd_hyper(1.0)]))
    assert weight._version > 0


def test_update_passes_opcheck():
    weights, grads = [torch.randn(4, 3), torch.randn(6, 3, 3, 3)], [torch.randn(2, 4), torch.randn(1, 6, 3, 3)]
    channels, hyper = [torch.tensor([0, 2]), torch.tensor([1])], hyper_rows([sgd_hyper(0.1, 0.9)] * 2)
    momenta = [torch.zeros_like(grad) for grad in grads]
    opcheck(
        torch.ops.trady.scatter_update_,
        (weights, grads, channels, hyper, momenta, [], "sgd", False, None, None, [], None),
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"algorithm": "lamb"}, "algorithm"),
        ({"hyper": torch.zeros(1, 3)}, "hyper"),
        ({"grads": [torch.ones(2, 5)]}, "layer 0"),
        ({"algorithm": "adamw"}, "momenta"),
        ({"seed": torch.tensor([1])}, "bfloat16"),
        ({"corrections": torch.ones(3, 2, dtype=torch.float64)}, r"corrections: got \(3, 2\)"),
    ],
)
def test_wrong_arguments_are_named(change, match):
    right = {
        "weights": [torch.ones(4, 3)], "grads": [torch.ones(2, 4)], "channels": [torch.tensor([0, 1])],
        "hyper": hyper_rows([sgd_hyper(1.0)]),
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        scatter_update_(**(right | change))
