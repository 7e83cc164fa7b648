"""The reduction of partial results sums every split once, in an order that depends on nothing but the sizes."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.numerics import GuardedArena, relative_error
from trady_triton.ops.select_config import MAX_WORKSPACE_BYTES
from trady_triton.ops.splitk_reduce import splitk_reduce_, splitk_reduce_ref_
from trady_triton.ops.workspace import workspace


@pytest.mark.parametrize(("S", "n"), [(1, 1), (3, 700), (33, 65), (5, 40000)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_sums_every_split_once(S, n, accumulate, generator):
    partials = torch.randn(S, n, generator=generator)
    start = torch.randn(n, generator=generator)
    with GuardedArena() as arena:
        out = splitk_reduce_(arena.place(start), arena.place(partials), accumulate)
    assert relative_error(out, partials.double().sum(0) + accumulate * start.double()) <= 1e-6
    assert torch.allclose(splitk_reduce_ref_(start.clone(), partials, accumulate), out, atol=1e-5)


def test_two_runs_are_bit_equal(generator):
    partials = torch.randn(40, 300, generator=generator)
    first, second = (splitk_reduce_(torch.empty(300), partials) for _ in range(2))
    assert torch.equal(first, second)


def test_no_elements_are_no_work():
    assert splitk_reduce_(torch.empty(0, 3), torch.empty(4, 0)).shape == (0, 3)


def test_opcheck():
    torch.library.opcheck(torch.ops.trady.splitk_reduce_.default, (torch.zeros(5), torch.randn(3, 5), True))


@pytest.mark.parametrize(
    ("out", "partials", "name"),
    [
        (torch.zeros(5), torch.zeros(3, 4), "out"),
        (torch.zeros(5, 2)[:, 0], torch.zeros(3, 5), "out"),
        (torch.zeros(5), torch.zeros(3, 5).half(), "partials"),
        (torch.zeros(5), torch.zeros(5), "partials"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(out, partials, name):
    with pytest.raises(ValueError, match=name):
        splitk_reduce_(out, partials)


def test_the_workspace_is_bounded():
    assert workspace(torch.device("cpu"), MAX_WORKSPACE_BYTES // 4).numel() == MAX_WORKSPACE_BYTES // 4
    with pytest.raises(ValueError, match="workspace"):
        workspace(torch.device("cpu"), MAX_WORKSPACE_BYTES // 4 + 1)


def test_a_workspace_belongs_to_one_op_at_a_time():
    """Kept from call to call, it would be shared by threads, and outlive the CUDA graph whose memory it is."""
    with FakeTensorMode():
        first, second = (workspace(torch.device("cuda", 0), 100) for _ in range(2))
        gone = weakref.ref(first)
        assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
        del first
    assert gone() is None
