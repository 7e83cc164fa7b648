"""Where a table or a rule names "mm", every weight gradient is taken by the library on the compact data."""

import pytest
import torch

from tests.ops.conv_cases import CONVS
from tests.ops.numerics import relative_error
from trady_triton.ops import conv_wgrad, dispatch, grouped_wgrad, select_config, store_channels, token_wgrad
from trady_triton.ops import wgrad_sqnorm as sqnorm
from trady_triton.ops.select_config import Arch, Config

CHANNELS = torch.tensor([0, 2, 3])
CONV = CONVS[0]


def token(generator):
    x, dy = torch.randn(70, 6, generator=generator), torch.randn(70, 9, generator=generator)
    return token_wgrad(store_channels(x, CHANNELS, "tokens"), dy), (x.double().t() @ dy.double())[CHANNELS]


def conv(generator):
    x, dy = CONV.draw(2, 6, 9, generator)
    out = conv_wgrad(store_channels(x, CHANNELS, "planes"), dy, *CONV.geometry)
    return out, CONV.dense_wgrad64(x, dy)[:, CHANNELS].transpose(0, 1)


def grouped(groups):
    def run(generator):
        x, dy = CONV.draw(2, 6, 6 * 20, generator, groups=groups)
        out = grouped_wgrad(
            store_channels(x, CHANNELS, "planes"), dy, CHANNELS, (6 // groups, 120 // groups), *CONV.geometry
        )
        dense = CONV.dense_wgrad64(x, dy, groups).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return out, dense[CHANNELS]

    return run


def depthwise(generator):
    x, dy = CONV.draw(2, 6, 6, generator, groups=6)
    out = grouped_wgrad(store_channels(x, CHANNELS, "planes"), dy, CHANNELS, (1, 1), *CONV.geometry)
    return out, CONV.dense_wgrad64(x, dy, 6)[CHANNELS]


def norm(generator):
    x, dy = torch.randn(70, 6, generator=generator), torch.randn(70, 9, generator=generator)
    return sqnorm(x, dy), (x.double().t() @ dy.double()).square().sum(1)


RUNS = {
    "token_wgrad": token,
    "conv_wgrad": conv,
    "grouped_wgrad": grouped(2),
    "depthwise_wgrad": depthwise,
    "wgrad_sqnorm": norm,
}


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("kernel", RUNS)
def test_mm_of_a_config_runs_the_library_unless_kernels_are_forced(kernel, backend, generator, monkeypatch):
    rule = select_config.RULES[kernel]

    def named(shape, dtype, arch):
        config = rule(shape, dtype, arch)
        return config if config.backend == "taps" else Config(config.meta, 4, 2, 1, "mm")

    launched, launch = [], dispatch.launch
    monkeypatch.setitem(select_config.RULES, kernel, named)
    monkeypatch.setenv("TRADY_TRITON_BACKEND", backend)
    for room in ("token_wgrad", "conv_wgrad", "grouped_wgrad", "depthwise_wgrad", "wgrad_norm"):
        module = __import__(f"trady_triton.ops.{room}", fromlist=["launch"])
        if hasattr(module, "use_triton"):  # as on a GPU
            monkeypatch.setattr(module, "use_triton", lambda tensor: True)
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda *a, **k: (launched.append(a), launch(*a, **k)))
    select_config._select.cache_clear()
    out, expected = RUNS[kernel](generator)
    select_config._select.cache_clear()
    assert relative_error(out, expected) <= 2e-6
    assert bool(launched) == (backend == "triton")


@pytest.mark.parametrize(
    ("T", "O", "K", "backend"), [(25216, 768, 768, "mm"), (25216, 3072, 384, "mm"), (25216, 2304, 48, "triton")]
)
def test_products_with_many_channels_go_to_cublas(T, O, K, backend):
    shape = {"T": T, "O": O, "K": K, "PQ": 1, "bits": 0}
    assert select_config.select_config("token_wgrad", shape, torch.bfloat16, Arch("sm_90")).backend == backend


@pytest.mark.parametrize(
    ("K", "dtype", "backend"), [(512, torch.bfloat16, "mm"), (32, torch.float32, "mm"), (32, torch.bfloat16, "triton")]
)
def test_convolutions_with_many_channels_go_to_cudnn(K, dtype, backend):
    shape = {"T": 6272, "O": 512, "K": K, "TAPS": 9, "PQ": 49}
    assert select_config.select_config("conv_wgrad", shape, dtype, Arch("sm_90")).backend == backend
