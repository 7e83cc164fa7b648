"""What a row counts, against cases counted by hand; layers of the kernels' benchmark against autograd."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from trady_triton.bench.bench_ops import check
from trady_triton.bench.case import count, inference_peak
from trady_triton.bench.layers import Layer, layers, work
from trady_triton.bench.movers import MOVERS
from trady_triton.bench.roofs import Roofs
from trady_triton.bench.training import Training, sgd
from trady_triton.functional import ConvGeometry, lean_conv2d, lean_linear
from trady_triton.meters import peak_memory
from trady_triton.ops import token_wgrad
from trady_triton.rehearsal import Step
from trady_triton.slot import ChannelSlot

FLOAT = 4


def small() -> tuple[nn.Sequential, Step]:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 5, bias=False))
    return model, Step(torch.randn(7, 3), torch.arange(7) % 5)


def test_the_peak_of_inference_is_the_widest_place_of_the_forward() -> None:
    model, step = small()
    # the second Linear has its input [7, 4] and its output [7, 5]; the ReLU has only two of [7, 4]
    assert inference_peak(model, step) == (7 * 5 + 7 * 4) * FLOAT
    assert model.training


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_row_counts_state_beside_activations_and_flops_by_kind(kind) -> None:
    model, step = small()
    row = count(Training(model, kind(model.parameters(), lr=0.1), {"0.weight", "2.weight"}), step)
    weights = 3 * 4 + 4 * 5
    state = 0 if kind is SGD else (2 * weights + 2) * FLOAT  # two moments, and a step count for each of two weights
    assert row["state_bytes"] == state
    loss_keeps = 7 * 5 * FLOAT + FLOAT  # log-probabilities and the total weight; labels are part of the batch
    batch = 7 * 3 * FLOAT
    assert row["kept_bytes"] == batch + 7 * 4 * FLOAT + loss_keeps + 7 * 8
    assert row["peak_bytes"] >= weights * FLOAT + state
    assert row["forward_flops"] == 2 * 7 * weights
    assert row["wgrad_flops"] == 2 * 7 * weights
    assert row["dgrad_flops"] == 2 * 7 * 4 * 5  # nobody needs dX of the first


def test_the_peak_of_many_parts_is_counted_to_the_byte() -> None:
    model = nn.Sequential(nn.Linear(3, 4000), nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Linear(4, 5, bias=False))
    step = Step(torch.randn(7, 3), torch.arange(7) % 5, micro_batch=1)
    training = sgd(model, SimpleNamespace(lr=0.1), {"3.weight"})
    row = count(training, step)
    training.optimizer.zero_grad()
    with peak_memory() as peak:
        training.step(step)
    # where the forward is widest live also the head's gradient, the loss of the part before and the sum of all
    assert row["peak_bytes"] == peak.peak_bytes == (2 * 4000 + 4 * 5 + 2) * FLOAT
    assert "forward_flops" not in row  # those of the whole batch say it


def test_adapters_count_as_memory_beyond_the_net() -> None:
    model, step = small()
    plain = sum(p.numel() * FLOAT for p in model.parameters())
    model[0].adapter = nn.Parameter(torch.zeros(10))
    row = count(Training(model, SGD(model.parameters(), lr=0.1), {"0.weight", "2.weight"}), step, plain)
    assert row["extra_weight_bytes"] == 10 * FLOAT


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: layer.name)
def test_the_layers_of_the_benchmark_compute_the_drawn_columns_of_the_dense_gradient(layer: Layer) -> None:
    one = work(layer, 1, "cpu", torch.float32)
    check(one, layer.name, torch.float32)
    assert one.sparse_flops * layer.in_channels == one.dense_flops * layer.drawn
    assert 0 < one.sparse_bytes < one.dense_bytes


class Ops(TorchDispatchMode):
    """The names of the library's ops that a block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "trady":
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: layer.name)
def test_what_is_timed_is_what_training_runs(layer: Layer) -> None:
    width, kernel = layer.in_channels // layer.groups, [layer.kernel] * 2 if layer.kind == "conv" else []
    slot = ChannelSlot("layer", nn.Parameter(torch.randn(layer.out_channels, width, *kernel), False), layer.groups, "")
    slot.set(range(layer.drawn))
    if layer.kind == "linear":
        y = lean_linear(torch.randn(layer.size**2, layer.in_channels), slot.weight, None, slot)
    else:
        geometry = ConvGeometry((layer.stride,) * 2, (layer.kernel // 2,) * 2, groups=layer.groups)
        x = torch.randn(1, layer.in_channels, layer.size, layer.size)
        y = lean_conv2d(x, slot.weight, None, slot, geometry)
    with Ops() as trained:
        y.sum().backward()
    with Ops() as timed:
        work(layer, 1, "cpu", torch.float32).sparse()
    assert timed.names - {"trady::store_channels"} == trained.names


@pytest.mark.parametrize("op", MOVERS)
@pytest.mark.parametrize("layer", layers()[2::4], ids=lambda layer: layer.name)
def test_the_ops_that_move_bytes_are_right_before_they_are_timed(op: str, layer: Layer) -> None:
    one = MOVERS[op](layer, 1, "cpu", torch.float32)
    check(one, layer.name, torch.float32)
    assert one.sparse_bytes > 0
    assert one.dense_bytes > 0
    one.dense()


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layers()[1]
    monkeypatch.setattr(
        "trady_triton.bench.layers.token_wgrad", lambda *args, **more: 1.001 * token_wgrad(*args, **more)
    )
    with pytest.raises(AssertionError, match=r"errs by 0\.001"):
        check(work(layer, 1, "cpu", torch.float32), layer.name, torch.float32)


def test_the_floor_is_the_longer_of_bytes_and_flops() -> None:
    roofs = Roofs(gbytes_per_s=10.0, tflops=2.0)
    assert roofs.floor(10**10, 10**12) == 1.0
    assert roofs.floor(10**9, 4 * 10**12) == 2.0
