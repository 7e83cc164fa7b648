"""A device that is not there: fake tensors on it, the host code of our ops run for real, every launch recorded.

    with pretended_cuda("sm_80") as recorded:
        x = torch.empty(8, 768, device="cuda")
        store_channels(x, channels, "tokens")
    recorded.launches[0].signature, recorded.launches[0].grid

Triton's own `JITFunction.run` binds and specialises the arguments, by fake addresses; only compilation and launch are
taken out. An op that has a kernel runs its CUDA implementation in place of its fake. What needs values of a device
tensor on the host (`.item()`, `.tolist()`, a boolean index) raises, as fake tensors have none.
"""

import contextlib
import re
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

import engine
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from trady_triton.ops import select_config, upload


def _device(name, major, minor, multi_processor_count, gib, **more):
    return SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=multi_processor_count,
                           total_memory=gib << 30, **more)  # fmt: skip


DEVICES = {
    "sm_80": _device("NVIDIA A100-SXM4-80GB", 8, 0, 108, 80),
    "sm_90": _device("NVIDIA H100 80GB HBM3", 9, 0, 132, 80),
    "sm_100": _device("NVIDIA B200", 10, 0, 148, 180),
    "gfx942": _device("AMD Instinct MI300X", 9, 4, 304, 192, gcnArchName="gfx942:sramecc+:xnack-"),
}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ALIGNMENT = 512  # of the CUDA allocator
MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """One launch: what triton would compile, and where it would run."""

    arch: str
    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[object, object], ...]
    attrs: tuple[tuple[object, object], ...]
    options: object
    grid: tuple[int, ...]

    @property
    def variant(self):
        """What is compiled once."""
        return self.arch, self.kernel, self.signature, self.constexprs, self.attrs, self.options

    @property
    def name(self):
        """The kernel's name, as the rules have it."""
        return self.kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")

    @property
    def constants(self):
        """{argument: value} of those that are constants."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constexprs}

    @property
    def is_fp32(self):
        """Whether dy is."""
        return dict(self.signature).get("dy_ptr") == "*fp32"

    @property
    def tile(self):
        """{argument: size} of those that a config names."""
        return {name: value for name, value in self.constants.items() if re.fullmatch("RB|B(?!ITS)[A-Z]+", name)}


class Recorded(TorchDispatchMode):
    """Runs the CUDA implementation of an op of ours, where fake tensors would ask its fake; both must agree.

    `launches` are all that were made, `problems` says what a device would refuse, and where a step waits for it.
    """

    def __init__(self):
        super().__init__()
        self.launches, self.problems, self.in_step = [], [], False

    def begin_step(self):
        self.in_step = True

    def end_step(self):
        self.in_step = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "trady":
            out = _as_cudnn(func, args, func(*args, **(kwargs or {})))
            if self.in_step and func in _LOOKED_AT:
                self.problems += _LOOKED_AT[func](args, kwargs or {}, out)
            return out
        expected = func(*args, **(kwargs or {}))
        with self:
            out = func._op_dk(torch._C.DispatchKey.CUDA, *args, **(kwargs or {}))
        pairs = zip(*(torch.utils._pytree.tree_leaves(value) for value in (out, expected)), strict=True)
        for ours, fake in pairs:
            assert _layout(ours) == _layout(fake), f"{func}: {_layout(ours)}, but its fake says {_layout(fake)}"
        return out


def _as_cudnn(func, args, out):
    """The result of a convolution in the memory format that cuDNN chooses; fake tensors do as without it."""
    if func is torch.ops.aten.convolution.default and any(map(_is_channels_last, args[:2])):
        return out.contiguous(memory_format=torch.channels_last)
    if func is torch.ops.aten.convolution_backward.default and out[0] is not None and _is_channels_last(args[2]):
        return (out[0].contiguous(memory_format=torch.channels_last), *out[1:])
    return out


def _moved(source, out, waits):
    """A copy between host and device that the host waits for, or may wait for as its memory is not page-locked."""
    waits = waits or out.device.type == "cpu" or (source.device.type == "cpu" and source not in _PINNED)
    return [f"{tuple(out.shape)} moves from {source.device} to {out.device}"] * (source.device != out.device and waits)


def _turned(args, kwargs, out):
    """Torch copies dy into the memory format of x before a convolution's backward."""
    dy, x = args[:2]
    turned = _is_channels_last(dy) != _is_channels_last(x)
    return [f"a convolution's backward turns dy {tuple(dy.shape)} into the layout of its input"] if turned else []


def _filled(args, kwargs, out):
    """Torch makes the input of a pool's backward contiguous, though only its layout counts."""
    x = args[1]
    return [f"a pool's backward fills an input of {tuple(x.shape)}"] if x.numel() > 1 and not any(x.stride()) else []


def _is_channels_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _sent(args, kwargs, out):
    return _moved(args[0], out, not (kwargs.get("non_blocking") or args[3:4] == (True,)))


_LOOKED_AT = {
    torch.ops.aten._to_copy.default: _sent,
    torch.ops.aten.to.device: _sent,  # inside an op of ours nothing is decomposed
    torch.ops.aten.to.dtype_layout: _sent,
    torch.ops.aten.copy_.default: lambda args, kwargs, out: _moved(args[1], out, args[2:] != (True,)),
    torch.ops.aten.convolution_backward.default: _turned,
    torch.ops.aten.max_pool2d_with_indices_backward.default: _filled,
    torch.ops.aten.avg_pool2d_backward.default: _filled,
}


def _layout(tensor):
    """All that a fake has to know of its op's result; a stride along a single element says nothing."""
    if tensor is None:
        return None
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return tensor.shape, strides, tensor.dtype, tensor.device


class _Driver:
    """What JITFunction asks of triton's active driver."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch, _CURRENT.device  # JITFunction keeps by it how it specialises

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGETS[self.arch]


_CURRENT = SimpleNamespace(device=0)


def _exchange_device(index):
    previous = _CURRENT.device
    if index >= 0:
        _CURRENT.device = index
    return previous


_PINNED = WeakIdKeyDictionary()


def _pin(tensor):
    """`upload.page_locked` of a fake tensor, which can be told from others."""
    pinned = tensor.clone()
    _PINNED[pinned] = True
    return pinned


def _address(tensor):
    return tensor.untyped_storage()._cdata * ALIGNMENT + tensor.storage_offset() * tensor.itemsize


def _refused(arguments, grid):
    """What a device would refuse: tensors that lie elsewhere, and grids out of its limits."""
    here = torch.device("cuda", _CURRENT.device)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    found = [
        f"{name} is on {tensor.device}, launched on {here}" for name, tensor in tensors.items() if tensor.device != here
    ]
    return found + [f"grid {grid}" for size, most in zip(grid, MAX_GRID, strict=True) if not 0 < size <= most]


def _recorder(recorded, arch):
    """A `JITFunction._do_compile` that returns a binary which records its launch."""

    def compile_nothing(self, key, signature, device, constexprs, options, attrs, warmup):
        def run(x, y, z, stream, function, metadata, launch_metadata, enter, exit, *values):
            arguments = dict(zip(self.arg_names, values, strict=True))
            grid, parts = (x, y, z), (tuple(signature.items()), _frozen(constexprs), _frozen(attrs))
            recorded.launches.append(Launch(arch, self, *parts, options, grid))
            recorded.problems += [f"{self.fn.__name__}: {text}" for text in _refused(arguments, grid)]

        return SimpleNamespace(run=run, launch_metadata=lambda *_: None, function=0, packed_metadata=())

    return compile_nothing


def _frozen(mapping):
    return tuple(
        (key, tuple(map(tuple, value)) if isinstance(value, list) else value) for key, value in mapping.items()
    )


@contextlib.contextmanager
def pretended_cuda(arch="sm_90"):
    """The launches inside the block, in which torch.cuda says that there are devices of that architecture."""
    recorded, device = Recorded(), DEVICES[arch]
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (FakeTensor, "data_ptr", _address),
            (JITFunction, "_do_compile", _recorder(recorded, arch)),
            (triton.runtime.driver, "_active", _Driver(arch)),
            (torch.autograd, "_engine_run_backward", engine.run_backward),
            (torch._C, "_current_graph_task_id", lambda: 1),  # else a checkpoint runs again for each tensor
            (upload, "page_locked", _pin),
            (select_config, "_cuda_arch", select_config._cuda_arch.__wrapped__),
            (torch.version, "hip", "7.0" if TARGETS[arch].backend == "hip" else None),
            (torch.cuda, "get_device_properties", lambda index=None: device),
            (torch.cuda, "get_device_capability", lambda index=None: (device.major, device.minor)),
            (torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
            (torch.cuda, "current_device", lambda: _CURRENT.device),
            (torch.cuda, "_exchange_device", _exchange_device),
            (torch.cuda, "_maybe_exchange_device", _exchange_device),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(FakeTensorMode())
        stack.enter_context(recorded)
        yield recorded
