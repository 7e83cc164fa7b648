"""The error that packing brings to the weight gradient of an early layer, which has crossed the whole network."""

from __future__ import annotations

import pytest

from trady_triton.bench.dw_error import errors

NETS = ("efficientnet_b0", "mobilenetv3_large_100", "vit_tiny_patch16_224", "convnext_atto")


@pytest.mark.parametrize("name", NETS)
def test_eight_bits_err_by_less_than_two_percent(name):
    found = errors(name, 64)
    error, cosine = found["8"]
    assert error <= 0.02
    assert cosine >= 0.9995
    assert found["2"][0] > error


def test_two_bits_point_the_same_way_in_a_transformer():
    assert errors("vit_tiny_patch16_224", 64)["2"][1] >= 0.9
