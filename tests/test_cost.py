"""Costs against numbers worked out by hand."""

import pytest
import torch
from torch import nn

from trady_triton.cost import CostModel, LayerShape, measure_call


def shape_of(layer: nn.Module, *size: int) -> LayerShape:
    x = torch.zeros(size)
    return measure_call(layer, x, layer(x), size[0])


def test_dense_convolution():
    shape = shape_of(nn.Conv2d(16, 32, 3, stride=2, padding=1), 2, 16, 10, 8)
    assert (shape.in_positions, shape.out_positions, shape.stored_positions) == (80, 20, 80)
    assert shape.channel_weights == 32 * 9
    assert shape.weights == 16 * 32 * 9
    assert shape.channel_wgrad_flops == 2 * 9 * 32 * 20  # twice eq. 4
    assert shape.dense_flops == 16 * shape.channel_wgrad_flops
    assert CostModel().channel_cost(shape) == 32 * 9 + 80  # eq. 3


def test_depthwise_convolution_and_the_papers_charge():
    shape = shape_of(nn.Conv2d(24, 24, 3, padding=1, groups=24), 4, 24, 8, 8)
    assert shape.channel_weights == 9
    assert shape.channel_wgrad_flops == 2 * 9 * 64
    assert CostModel().channel_cost(shape) == 9 + 64
    assert CostModel(depthwise="paper").channel_cost(shape) == 1 + 64


def test_paper_charge_leaves_other_layers_alone():
    for layer in (nn.Conv2d(24, 48, 3, groups=12), nn.Conv2d(24, 8, 1)):
        shape = shape_of(layer, 1, 24, 8, 8)
        assert CostModel(depthwise="paper").channel_cost(shape) == CostModel().channel_cost(shape)


def test_grouped_convolution_reaches_only_its_group():
    shape = shape_of(nn.Conv2d(12, 24, 5, groups=3), 1, 12, 9, 9)
    assert shape.channel_weights == 24 // 3 * 25
    assert shape.channel_wgrad_flops == 2 * 25 * 8 * 25


def test_strided_pointwise_stores_what_it_reads():
    shape = shape_of(nn.Conv2d(4, 6, 1, stride=2), 1, 4, 9, 9)
    assert (shape.in_positions, shape.stored_positions) == (81, 25)
    padded = shape_of(nn.Conv2d(4, 6, 1, stride=2, padding=1), 1, 4, 9, 9)
    assert padded.stored_positions == 81


@pytest.mark.parametrize("leading", [(), (7,), (7, 3)])
def test_linear_with_any_leading_dimensions(leading):
    shape = shape_of(nn.Linear(10, 6), 2, *leading, 10)
    tokens = torch.Size(leading).numel()
    assert (shape.in_positions, shape.out_positions) == (tokens, tokens)
    assert shape.channel_wgrad_flops == 2 * 6 * tokens
    assert CostModel().channel_cost(shape) == 6 + tokens


def test_windows_folded_into_the_batch_count_as_positions():
    layer, x = nn.Linear(10, 6), torch.zeros(2 * 4, 49, 10)
    assert measure_call(layer, x, layer(x), batch_size=2).in_positions == 4 * 49


def test_bytes_at_a_batch_and_mixed_dtypes():
    shape = shape_of(nn.Conv2d(16, 32, 3, padding=1), 1, 16, 8, 8)
    cost = CostModel(batch_size=32, gradient_itemsize=4, activation_itemsize=2, unit="bytes")
    assert cost.channel_cost(shape) == 4 * 288 + 32 * 64 * 2


@pytest.mark.parametrize("wrong", [{"depthwise": "free"}, {"batch_size": 0}, {"batch_size": True}, {"unit": "kg"}])
def test_a_bad_cost_model_is_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        CostModel(**wrong)
