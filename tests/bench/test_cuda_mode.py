"""The CUDA mode as far as it can be seen without a device: what it would run, and a clear word where there is none."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from trady_triton.bench import grid
from trady_triton.bench.config import bars_nets_of, nets_of, settings
from trady_triton.bench.methods import METHODS
from trady_triton.bench.nets import Net
from trady_triton.bench.worker import MARK

NO_DEVICE = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")


def test_every_case_is_for_the_device_in_bfloat16_and_channels_last() -> None:
    nets = [case.net for case in (*grid.step_cases("cuda"), *grid.pareto_cases("cuda"))] + bars_nets_of("cuda")
    assert {net.device for net in nets} == {"cuda"}
    assert {(net.autocast, net.channels_last) for net in nets} == {(torch.bfloat16, True)}
    for net in {*nets}:
        assert Net.from_dict(net.described()) == net
    assert "vit_base_patch16_224" in {net.name for net in nets_of("cuda")}


def test_what_decides_comes_before_the_rest() -> None:
    steps = sorted(grid.step_cases("cuda"), key=lambda case: grid._turn("cuda", case))
    keys = [METHODS[case.method].is_key for case in steps if not METHODS[case.method].is_costly]
    assert keys == sorted(keys, reverse=True)
    assert METHODS[steps[-1].method].is_costly


def test_parts_together_stay_within_nine_minutes() -> None:
    assert settings("cuda")["minutes"] <= 5  # beside them run the bars and the kernels


@NO_DEVICE
@pytest.mark.parametrize("name", ["__main__", "bench_step", "bench_pareto", "bench_bars"])
def test_without_a_device_a_line_says_so(name: str, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(importlib.import_module(f"trady_triton.bench.{name}").main)
    done = CliRunner().invoke(app, ["--mode", "cuda", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "there is no CUDA device here" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


@NO_DEVICE
def test_a_net_that_fails_to_build_costs_its_cases_alone() -> None:
    cases = [grid.step_cases("cuda")[0].inputs, {**grid.step_cases("quick")[4].inputs, "repeats": 1}]
    done = subprocess.run([sys.executable, "-m", "trady_triton.bench.worker"], input=json.dumps(cases), text=True,
                          capture_output=True)  # fmt: skip
    rows = [json.loads(line[len(MARK) :]) for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert [row["status"] for row in rows] == ["failed", "ok"]
