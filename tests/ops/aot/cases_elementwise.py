"""Shipped configs of the packed activations, of their fused form and of the optimizer step."""

import torch
import triton.language as tl
from harness import Case

from trady_triton.ops.act_pack import _pack_kernel, _unpack_kernel, code_constants
from trady_triton.ops.act_store import _act_store_kernel
from trady_triton.ops.activation import SMOOTH
from trady_triton.ops.scatter_update import CONFIG, _scatter_update_kernel
from trady_triton.ops.select_config import Arch, select_config

KINDS = [("relu6", 1), ("gelu", 8), ("gelu", 2), ("gelu_tanh", 8), ("silu", 8), ("hardswish", 8)]


def config_of(kernel):
    return select_config(kernel, {"n": 1 << 20, "T": 25088, "C": 768}, torch.bfloat16, Arch("sm_90"))


def case(name, kernel, signature, constexprs, config, ci=False):
    pointers = tuple(argument for argument in signature if argument.endswith("_ptr") or argument in ("n", "T"))
    aligned, options = pointers, {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Case(name, kernel, signature, {**constexprs, **config.meta}, aligned=aligned, ci=ci, **options)


def pack(kind, bits, stochastic=False):
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "code_ptr": "*u8"} | ({"seed_ptr": "*i64"} if stochastic else {})
    signature |= {"n": "i32", "low": "fp32", "high": "fp32"}
    name = f"act_pack {kind} {bits} bits" + " stochastic" * stochastic
    return case(name, _pack_kernel, signature, {"KIND": kind, **code_constants(kind, bits)}, config_of("act_pack"))


def unpack(kind, bits):
    constants = {key: value for key, value in code_constants(kind, bits).items() if not key.startswith("T")}
    constants |= {f"L{i}": level for i, level in enumerate(SMOOTH[kind].levels if kind in SMOOTH else (0.0,) * 4)}
    signature = {"dy_ptr": "*bf16", "code_ptr": "*u8", "dx_ptr": "*bf16", "n": "i32", "slope": "fp32"}
    return case(f"act_unpack {bits} bits", _unpack_kernel, signature, constants, config_of("act_pack"))


def fused(kind, bits, pixel_major=False, stochastic=False):
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "code_ptr": "*u8", "slots_ptr": "*i32", "store_ptr": "*bf16"}
    signature |= {"seed_ptr": "*i64"} if stochastic else {}
    signature |= {"T": "i32", "row_units": "i32", "low": "fp32", "high": "fp32"}
    constants = {"C": 768, "KIND": kind, "PIXEL_MAJOR": pixel_major, "UNIT": 8, **code_constants(kind, bits)}
    name = f"act_store {kind} {bits} bits" + " pixel-major" * pixel_major + " stochastic" * stochastic
    return case(
        name, _act_store_kernel, signature, constants, config_of("act_store"), kind == "relu6" and not pixel_major
    )


def update(algorithm, weight, stochastic=False, momentum=False, corrected=False):
    signature = {
        "layers_ptr": "*i64",
        "blocks_ptr": "*i32",
        "grads_ptr": "*i64",
        "hyper_ptr": "*fp64",
        "found_inf_ptr": "*fp32",
    }
    signature |= {"corrections_ptr": "*fp64"} if corrected else {}
    signature |= {"seed_ptr": "*i64"} if stochastic else {}
    signature |= {"weight_ptr": f"*{weight}", "grad_ptr": "*fp32", "state_ptr": "*fp32", "ids_ptr": "*i64"}
    constants = {"ADAMW": algorithm == "adamw", "MOMENTUM": momentum, "NESTEROV": False, "STOCHASTIC": stochastic}
    constants["COMPUTE"] = tl.float32
    name = f"scatter_update {algorithm} {weight}" + " momentum" * momentum + " stochastic" * stochastic
    name += " by channel" * corrected
    ci = algorithm == "adamw" and stochastic
    return case(name, _scatter_update_kernel, signature, constants, CONFIG, ci)


CASES = [pack(kind, bits) for kind, bits in KINDS] + [pack("gelu", 8, stochastic=True)]
CASES += [unpack(kind, bits) for kind, bits in KINDS[:3]]
CASES += [fused(kind, bits, pixel_major) for kind, bits in KINDS[:3] for pixel_major in (False, True)]
CASES += [fused("gelu", 8, stochastic=True)]
CASES += [update("sgd", "fp32"), update("sgd", "fp32", momentum=True), update("sgd", "bf16", stochastic=True)]
CASES += [update("adamw", "fp32"), update("adamw", "fp32", corrected=True), update("adamw", "bf16", stochastic=True)]
