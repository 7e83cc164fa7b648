"""The rules stay within the limits of the hardware and of the workspace for every shape."""

import json
import random
from types import SimpleNamespace

import pytest
import torch

from trady_triton.ops import select_config as module
from trady_triton.ops.select_config import (
    MAX_ACCUMULATORS_PER_THREAD,
    MAX_PROGRAMS,
    MAX_WORKSPACE_BYTES,
    Arch,
    Config,
    select_config,
    split_count,
    table_key,
)

ARCHS = [Arch("sm_80", 108), Arch("sm_90", 132), Arch("sm_100", 148), Arch("gfx942", 304)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_shapes(count):
    draw = random.Random(0)
    for _ in range(count):
        T, O, K = (int(top ** draw.random()) for top in (10**6, 4096, 512))
        PQ = draw.choice([1, 49, 196, 784, 3136])
        shape = {"T": T, "O": O, "K": K, "PQ": PQ, "bits": draw.choice([0, 4, 8])}
        yield shape, draw.choice(DTYPES), draw.choice(ARCHS)


def ceil_div(a, b):
    return -(-a // b)


def test_token_wgrad_stays_within_its_limits():
    for shape, dtype, arch in random_shapes(10_000):
        config = select_config("token_wgrad", shape, dtype, arch)
        BM, BN, BK = config.meta.values()
        threads = config.num_warps * (64 if arch.hip else 32)
        programs = ceil_div(shape["K"], BM) * ceil_div(shape["O"], BN) * config.split
        assert BM * BN // threads <= MAX_ACCUMULATORS_PER_THREAD
        assert config.split == 1 or 4 * config.split * shape["K"] * shape["O"] <= MAX_WORKSPACE_BYTES
        assert config.split == 1 or config.split * 4 * BK <= shape["T"]
        assert programs <= MAX_PROGRAMS
        assert 128 % BK == 0, "a tile of tokens lies in one group of a quantised store"


@pytest.mark.parametrize(
    ("programs", "steps", "partial_bytes", "split"),
    [
        (4, 98, 1 << 18, 20),  # few programs: parts of 5 steps
        (32, 98, 884_736, 4),  # one round of the device
        (12, 394, 1 << 18, 11),
        (132, 98, 1 << 18, 1),  # the device is full
        (100, 98, 1 << 16, 1),  # a second round would be half empty
        (4, 98, 1 << 21, 4),  # what fits the workspace
        (4, 7, 1 << 10, 1),  # a part has 4 steps at least
        (4, 10_000, 1 << 24, 1),  # more than the workspace
    ],
)
def test_a_sum_is_cut_so_that_the_device_is_busy(programs, steps, partial_bytes, split):
    assert split_count(programs, steps, 2 * 64 * (128 + 128), partial_bytes, slots=132) == split


def test_token_wgrad_reads_dy_once_for_as_many_channels_as_registers_allow():
    for shape, dtype, arch in random_shapes(2_000):
        config = select_config("token_wgrad", shape, dtype, arch)
        most = 64 if dtype == torch.float32 else {0: 256, 8: 128, 4: 64}[shape["bits"]]
        assert shape["K"] > most or config.meta["BM"] >= shape["K"]


def test_wgrad_sqnorm_stays_within_its_limits():
    for shape, dtype, arch in random_shapes(10_000):
        O, C = 64 * shape["O"], 8 * shape["K"]  # up to a vocabulary of outputs
        config = select_config("wgrad_sqnorm", {"T": shape["T"], "O": O, "C": C}, dtype, arch)
        BM, BN, _ = config.meta.values()
        threads = config.num_warps * (64 if arch.hip else 32)
        assert BM * BN // threads <= MAX_ACCUMULATORS_PER_THREAD
        assert config.backend == "mm" or 4 * ceil_div(O, BN) * C <= MAX_WORKSPACE_BYTES


@pytest.mark.parametrize(("K", "PQ", "backend"), [(48, 1, "triton"), (512, 1, "mm"), (512, 49, "triton")])
def test_many_channels_go_to_cublas_where_dy_is_one_matrix(K, PQ, backend):
    shape = {"T": 25088, "O": 768, "K": K, "PQ": PQ, "bits": 0}
    assert select_config("token_wgrad", shape, torch.bfloat16, Arch("sm_90")).backend == backend


@pytest.mark.parametrize(
    ("name", "num_sms"),
    [("NVIDIA A100-SXM4-80GB", 108), ("NVIDIA H100 80GB HBM3", 132), ("NVIDIA L4", 58), ("NVIDIA L40S", 7)],
)
def test_a_device_counts_as_its_kind_and_no_other(name, num_sms, monkeypatch):
    found = SimpleNamespace(name=name, major=8, minor=9, multi_processor_count=7)  # as a part of a divided one has
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.version, "hip", None)
    assert module._cuda_arch.__wrapped__(0) == Arch("sm_89", num_sms)


def forget():
    for cached in (module._tuned_table, module._select):
        cached.cache_clear()


def test_a_tuned_entry_wins_over_the_rule(tmp_path, monkeypatch):
    shape = {"T": 25000, "O": 768, "K": 40, "PQ": 1, "bits": 0}
    key = table_key("token_wgrad", {**shape, "K": 64, "T": 32768}, torch.bfloat16, Arch("sm_90"))
    table = tmp_path / "tuned.json"
    table.write_text(json.dumps({key: {"backend": "mm", "meta": {"BM": 64, "BN": 64, "BK": 64}}}))
    monkeypatch.setattr(module, "TABLE_FILE", table)
    forget()
    try:
        tuned = select_config("token_wgrad", shape, torch.bfloat16, Arch("sm_90"))
        others = [
            select_config("token_wgrad", shape, torch.bfloat16, Arch("sm_80")),
            select_config("token_wgrad", {**shape, "PQ": 49}, torch.bfloat16, Arch("sm_90")),
        ]
    finally:
        forget()
    assert tuned == Config({"BM": 64, "BN": 64, "BK": 64}, backend="mm")
    assert [other.backend for other in others] == ["triton", "triton"]


def test_a_kernel_without_a_rule_is_named():
    with pytest.raises(KeyError, match="no_such_kernel"):
        select_config("no_such_kernel", {}, torch.float32, Arch("sm_90"))
