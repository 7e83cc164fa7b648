"""On a device: steps wait for nothing, are the same from CUDA graphs, streams and threads, and deterministic."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.ops.device_net import backward, planned_net, step
from trady_triton import ops

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    """What runs is chosen as for users."""
    monkeypatch.setenv("TRADY_TRITON_BACKEND", "auto")


def gradients(optimizer, run):
    """The gradients that `run` leaves, whole ones and compact ones."""
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    for leaf in leaves:
        leaf.grad = None
    run()
    return [leaf.grad for leaf in leaves]


def assert_close(ours, expected):
    """Up to what bfloat16 does to intermediates that are summed or fused in another order."""
    for gradient, reference in zip(ours, expected, strict=True):
        assert (gradient - reference).norm() <= 2e-2 * reference.norm()


@pytest.mark.parametrize("store", ["same", "int8"])
@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_the_host_never_waits_in_a_step(algorithm, store):
    net, optimizer, batch = planned_net(store, algorithm)
    for _ in range(2):  # compiles, and builds the tables
        step(net, optimizer, *batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(net, optimizer, *batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_deterministic_where_torch_has_to_be(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        net, optimizer, batch = planned_net()
        first, again = (
            [g.clone() for g in gradients(optimizer, lambda: backward(net, *batch))] for _ in range(2)
        )  # fmt: skip
        step(net, optimizer, *batch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_forward_and_backward_replay_from_a_cuda_graph():
    net, optimizer, (x, y) = planned_net()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(optimizer, lambda: backward(net, x, y))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(optimizer, lambda: backward(net, x, y))
    x.copy_(torch.randn_like(x))
    others = [torch.full((1 << n,), float("nan"), device="cuda") for n in range(8, 22)]  # where memory was freed
    graph.replay()
    assert_close(captured, gradients(optimizer, lambda: backward(net, x, y)))
    assert all(other.isnan().all() for other in others)


def test_compiled_into_cuda_graphs():
    net, optimizer, (x, y) = planned_net()
    compiled = torch.compile(net, mode="reduce-overhead")
    expected = [g.clone() for g in gradients(optimizer, lambda: backward(net, x, y))]
    for _ in range(4):  # warms up, records, replays
        torch.compiler.cudagraph_mark_step_begin()
        ours = [g.clone() for g in gradients(optimizer, lambda: backward(compiled, x, y))]
    assert_close(ours, expected)


@pytest.mark.parametrize("own_streams", [True, False])
def test_threads_do_not_disturb_each_other(own_streams):
    torch.manual_seed(0)
    inputs = [[torch.randn(size, device="cuda").bfloat16() for size in ((48, 6272), (6272, 512))] for _ in range(4)]
    expected = [ops.token_wgrad(*pair) for pair in inputs]
    torch.cuda.synchronize()

    def run(number):
        stream = torch.cuda.Stream() if own_streams else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            return all(torch.equal(ops.token_wgrad(*inputs[number]), expected[number]) for _ in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_step_on_a_device_that_is_not_the_current_one():
    net, optimizer, batch = planned_net(device="cuda:1")
    expected = [g.clone() for g in gradients(optimizer, lambda: backward(net, *batch))]
    with torch.cuda.device(1):
        assert_close(gradients(optimizer, lambda: backward(net, *batch)), expected)
    step(net, optimizer, *batch)
    torch.cuda.synchronize(1)
