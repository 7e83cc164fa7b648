"""Norms of weight gradients equal the norms of the gradients that autograd takes."""

import pytest
import torch

from tests.ops.numerics import GuardedArena, relative_error
from trady_triton.ops import token_matmul, wgrad_norm
from trady_triton.ops.wgrad_norm import conv_wgrad_sqnorm, wgrad_sqnorm, wgrad_sqnorm_ref


def definition(x, dy, channel_dim):
    tokens, dy_tokens = (y.double().movedim(channel_dim, -1).flatten(0, -2) for y in (x, dy))
    return (tokens.t() @ dy_tokens).square().sum(1)


def make(layouts, N, C, O, side, dtype, generator):
    x, dy = (torch.randn(N, size, side, side, generator=generator).to(dtype) for size in (C, O))
    if layouts == "tokens":
        return x.permute(0, 2, 3, 1).contiguous(), dy.permute(0, 2, 3, 1).contiguous(), -1
    formats = [torch.channels_last if layout == "cl" else torch.contiguous_format for layout in layouts]
    return x.to(memory_format=formats[0]), dy.to(memory_format=formats[1]), 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layouts", ["tokens", ("nchw", "nchw"), ("cl", "nchw"), ("cl", "cl")])
def test_equals_the_definition_inside_poisoned_memory(layouts, dtype, generator):
    x, dy, channel_dim = make(layouts, 3, 37, 70, 9, dtype, generator)
    with GuardedArena() as arena:
        out = wgrad_sqnorm(arena.place(x), arena.place(dy), channel_dim)
    assert relative_error(out, definition(x, dy, channel_dim)) <= 4e-6
    assert relative_error(wgrad_sqnorm_ref(x, dy, channel_dim), definition(x, dy, channel_dim)) <= 4e-6


@pytest.mark.parametrize(("N", "C", "O", "side"), [(1, 1, 1, 1), (2, 1, 5, 3), (1, 130, 1, 2), (0, 3, 4, 2)])
def test_edges_of_every_size(N, C, O, side, generator):
    x, dy, channel_dim = make(("nchw", "nchw"), N, C, O, side, torch.float32, generator)
    out = wgrad_sqnorm(x, dy, channel_dim)
    assert out.shape == (C,)
    assert torch.allclose(out.double(), definition(x, dy, channel_dim), rtol=1e-5)


def test_strided_inputs_are_read_correctly(generator):
    x, dy = torch.randn(2, 6, 8, 8, generator=generator), torch.randn(2, 5, 4, 4, generator=generator)
    out = conv_wgrad_sqnorm(x, dy, (1, 1), stride=(2, 2))
    assert relative_error(out, definition(x[:, :, ::2, ::2], dy, 1)) <= 4e-6


def test_the_gradient_is_taken_in_bounded_chunks(monkeypatch, generator):
    x, dy, channel_dim = make("tokens", 2, 6, 11, 3, torch.float32, generator)
    sizes = []
    original = token_matmul.token_matmul
    monkeypatch.setattr(wgrad_norm, "MAX_WORKSPACE_BYTES", 4 * 6 * 4)
    monkeypatch.setattr(
        wgrad_norm, "token_matmul", lambda a, b: sizes.append(a.shape[1] * b.shape[2]) or original(a, b)
    )
    assert relative_error(wgrad_sqnorm_ref(x, dy), definition(x, dy, channel_dim)) <= 4e-6
    assert max(sizes) <= 6 * 4


@pytest.mark.parametrize(
    ("C", "O", "groups", "geometry"),
    [(6, 8, 1, ((1, 1), (1, 1), (1, 1))), (6, 8, 2, ((2, 1), (0, 2), (1, 2))), (6, 12, 6, ((2, 2), (1, 1), (1, 1)))],
)
@pytest.mark.parametrize("limit", [200, 8 << 20])
def test_norms_of_any_convolution(C, O, groups, geometry, limit, monkeypatch, generator):
    monkeypatch.setattr(wgrad_norm, "MAX_WORKSPACE_BYTES", limit)
    x = torch.randn(2, C, 9, 10, generator=generator)
    weight = torch.randn(O, C // groups, 3, 3, generator=generator).double().requires_grad_()
    y = torch.nn.functional.conv2d(x.double(), weight, None, *geometry, groups)
    dy = torch.randn(y.shape, generator=generator)
    (gradient,) = torch.autograd.grad(y, weight, dy.double())
    expected = gradient.square().unflatten(0, (groups, -1)).sum((1, 3, 4)).flatten()
    assert relative_error(conv_wgrad_sqnorm(x, dy, (3, 3), *geometry, groups), expected) <= 4e-6


def test_opcheck():
    torch.library.opcheck(torch.ops.trady.wgrad_sqnorm.default, (torch.randn(2, 3, 4), torch.randn(2, 3, 5), -1))


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="x: got"):
        wgrad_sqnorm(torch.ones(5, 3), torch.ones(6, 3))
    with pytest.raises(ValueError, match="channel_dim"):
        wgrad_sqnorm(torch.ones(5, 3), torch.ones(5, 3), 2)
