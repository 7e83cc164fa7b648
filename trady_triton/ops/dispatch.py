"""The one place that decides whether an op runs as a Triton kernel or as its torch twin.

Use in an op file (triton stays optional: without it `jit` leaves the function alone and `tl` is None):

    from __future__ import annotations            # keeps `tl.constexpr` annotations unevaluated
    from trady_triton.ops.dispatch import INTERPRET, jit, launch, tl, use_triton

    @jit(do_not_specialize=["K"])
    def _kernel(x_ptr, K, BLOCK: tl.constexpr): ...

    def _impl(x):
        if not use_triton(x):
            return op_ref(x)
        launch(_kernel, grid, x, K, config=config)    # config: select_config.Config; its `meta` are keyword constexprs

`INTERPRET` is the value to pass for an `UP: tl.constexpr` switch: the interpreter computes on raw bits of bf16,
so kernels upcast every loaded tile to fp32 there.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton
    import triton.language as tl

    from trady_triton.ops.select_config import Config
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = None

__all__ = [
    "BACKENDS",
    "INTERPRET",
    "backend",
    "deterministic",
    "jit",
    "launch",
    "takes_library",
    "tl",
    "triton",
    "use_triton",
]

BACKENDS = ("auto", "triton", "torch")
INTERPRET: bool = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(fn: Callable[..., Any] | None = None, *, do_not_specialize: tuple[str, ...] | list[str] = ()) -> Any:
    """`triton.jit`, or the bare function where triton is not installed; `do_not_specialize` names run-time sizes."""
    if fn is None:
        return lambda function: jit(function, do_not_specialize=do_not_specialize)
    if triton is None:
        return fn
    return triton.jit(fn, do_not_specialize=list(do_not_specialize))


def backend() -> str:
    """The value of TRADY_TRITON_BACKEND.

    Raises: ValueError when it is unknown.
    """
    name = os.environ.get("TRADY_TRITON_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"TRADY_TRITON_BACKEND: got {name!r}, wanted one of {', '.join(BACKENDS)}")
    return name


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op on `tensor` launches its kernel.

    Raises: ValueError when TRADY_TRITON_BACKEND asks for triton where it cannot run.
    """
    name = backend()
    if name == "auto":
        return triton is not None and tensor.is_cuda and _runs_kernels(tensor.device)
    if name == "torch":
        return False
    if triton is None:
        raise ValueError("TRADY_TRITON_BACKEND=triton, but triton is not installed; wanted: 'auto', or triton")
    if not (tensor.is_cuda or INTERPRET):
        raise ValueError(
            f"TRADY_TRITON_BACKEND=triton, but the tensor is on {tensor.device} and kernels need CUDA or HIP; "
            "on the CPU they only run when TRITON_INTERPRET=1 was set before the first import"
        )
    return True


@functools.cache
def _runs_kernels(device: torch.device) -> bool:
    """Whether triton compiles for a GPU: for any of AMD's, for NVIDIA's from compute capability 8.0 on."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def takes_library(config: Config) -> bool:
    """Whether `config` names cuBLAS or cuDNN on the compact data, and no backend is forced."""
    return config.backend == "mm" and backend() != "triton"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constexprs: Any) -> None:
    """Launch `kernel` on the device of its first tensor argument with the tile sizes and options of `config`."""
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    guard = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    with guard:
        kernel[grid](
            *args,
            **config.meta,
            **constexprs,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )


def deterministic(requested: bool = True) -> bool:
    """Whether two-pass reductions are used: on request, or because torch.use_deterministic_algorithms is on."""
    return requested or torch.are_deterministic_algorithms_enabled()
