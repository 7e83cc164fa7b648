"""The bias gradient is the sum over everything but the channels."""

import pytest
import torch

from tests.ops.numerics import relative_error
from trady_triton.ops.bias_grad import bias_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_everything_but_the_channels(dtype, generator):
    dy = torch.randn(300, 5, 4, 3, generator=generator).to(dtype)
    assert relative_error(bias_grad(dy, 1), dy.double().sum((0, 2, 3))) <= 1e-6
    assert relative_error(bias_grad(dy), dy.double().sum((0, 1, 2))) <= 1e-6
    assert bias_grad(dy, 1, out_dtype=dtype).dtype == dtype
