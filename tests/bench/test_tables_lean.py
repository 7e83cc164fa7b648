"""The counts behind the tables of lean modules: they bear the bars that the project has set."""

import json
from pathlib import Path

import pytest

from trady_triton.bench.tables_lean import NETS, PEAKS, count

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "lean.json"
RELU = ("mobilenetv2_035", "mobilenetv2_100", "mobilenetv4_conv_small", "mnasnet_100", "tf_efficientnet_lite0",
        "fbnetc_100", "resnet18", "resnet50", "densenet121", "vgg11_bn")  # fmt: skip
BARS = dict.fromkeys(RELU, 100) | {
    "efficientnet_b0": 24, "mobilenetv3_large_100": 24, "swin_tiny_patch4_window7_224": 24, "convnext_tiny": 19,
    "vit_tiny_patch16_224": 14, "vit_small_patch16_224": 14, "vit_base_patch16_224": 14, "deit3_small_patch16_224": 14,
}  # fmt: skip


def rows() -> dict:
    return json.loads(RESULTS.read_text())["cases"]


def test_every_net_is_counted() -> None:
    assert set(rows()) == set(NETS)


@pytest.mark.parametrize(("name", "bar"), BARS.items())
def test_the_exact_policy_keeps_less_by_the_bar(name: str, bar: int) -> None:
    row = rows()[name]
    assert row["full"]["kept"] >= bar * row["lean"]["kept"]


@pytest.mark.parametrize(("name", "bar"), {**dict.fromkeys(PEAKS, 1.1), "vit_small_patch16_224": 2.0}.items())
def test_a_step_peaks_near_inference(name: str, bar: float) -> None:
    row = rows()[name]
    assert row["lean"]["peak"] <= bar * row["inference"]


def test_the_counts_are_those_of_this_version() -> None:
    counted, row = count("mobilenetv2_035", 8), rows()["mobilenetv2_035"]
    assert {key: row[key] for key in counted} == counted
