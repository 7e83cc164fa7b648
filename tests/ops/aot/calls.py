"""Calls of every op that launch each tile which the rules ship, in every layout that is compiled apart from others.

    CALLS["token_wgrad tokens"] = [function, ...]     # a kernel and what is special; calls that differ in sizes alone

The functions run on fake CUDA tensors (pretended.py). Pointers, strides and what is aligned come from the op itself.
N images, T tokens, O out, K selected channels, M outputs of a group.
"""

from collections import defaultdict
from functools import partial
from itertools import product

import torch

from trady_triton import ops
from trady_triton.ops.act_store import channel_slots
from trady_triton.ops.select_config import MAX_WORKSPACE_BYTES
from trady_triton.ops.splitk_reduce import splitk_reduce_launch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = [("relu6", 1), ("gelu", 8), ("gelu", 2), ("gelu_tanh", 8), ("silu", 8), ("hardswish", 8)]
KS = (8, 32, 64, 128, 256)
CALLS = defaultdict(list)


def add(label, function, *arguments, **options):
    """Another call of a label; words that say nothing special are empty."""
    CALLS[" ".join(label.split())].append(partial(function, *arguments, **options))


def empty(*shape, dtype="bf16", channels_last=False):
    tensor = torch.empty(shape, dtype=DTYPES.get(dtype, dtype), device="cuda")
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def ids(K):
    return empty(K, dtype=torch.int64)


def seed(stochastic=True):
    return empty(1, dtype=torch.int64) if stochastic else None


def image(layout, N, C, size=0, dtype="bf16"):
    """[N, C, 56, 56] for "nchw56" or "nhwc56"; another size where one is given."""
    size = size or int(layout[4:])
    return empty(N, C, size, size, dtype=dtype, channels_last=layout.startswith("nhwc"))


def token_wgrad(layout, K, O=768, T=25088, bits=0, dtype="bf16", **options):
    store, codes = empty(K, T, dtype=dtype), {}
    if bits:
        store, codes["scale"], codes["zero"] = ops.quantize_channels(empty(T, K), ids(K), "tokens", bits)
    dy = empty(T, O, dtype=dtype) if layout == "tokens" else image(layout, T // int(layout[4:]) ** 2, O, dtype=dtype)
    return ops.token_wgrad(store, dy, -1 if layout == "tokens" else 1, bits=bits, **codes, **options)


for layout, bits, O, K in product(("tokens", "nchw14", "nchw7"), (0, 8, 4), (768, 64, 32), KS):
    add(f"token_wgrad {layout} {f'int{bits}' if bits else ''}", token_wgrad, layout, K, O, bits=bits)
for K in KS:
    add("token_wgrad nchw56", token_wgrad, "nchw56", K)
add("token_wgrad tokens ones", token_wgrad, "tokens", 63, ones_row=True)
add("token_wgrad tokens atomic", token_wgrad, "tokens", 63, deterministic=False)
for K in (16, 64):
    add("token_wgrad tokens peel", token_wgrad, "tokens", K, T=25084)
    add("token_wgrad nchw56 wide", token_wgrad, "nchw56", K, 768, 1024 * 56 * 56)
for layout, K in product(("nchw7", "nchw14"), KS[:3]):  # fp32 else is cuBLAS's
    T = int(layout[4:]) ** 2 * 16 * (MAX_WORKSPACE_BYTES // (4 * K * 32) + 1)
    add(f"token_wgrad {layout} fp32", token_wgrad, layout, K, 32, T, dtype="fp32")


def wgrad_sqnorm(layout, C, O):
    if layout == "tokens":
        return ops.wgrad_sqnorm(empty(25088, C), empty(25088, O))
    return ops.wgrad_sqnorm(image(layout, 32, C), image(layout, 32, O), 1)


for C, O in product((768, 64, 32, 16), (12000, 17408, 24000, 50000)):  # smaller tiles, and fewer, go to cuBLAS
    add("wgrad_sqnorm tokens", wgrad_sqnorm, "tokens", C, O)
for C, O in ((768, 12288), (64, 20000), (16, 50000)):
    add("wgrad_sqnorm nchw28", wgrad_sqnorm, "nchw28", C, O)


def conv(layout, C, O, R, stride=1, N=128, dtype="bf16"):
    """Input, dy and geometry of a convolution with R x R taps."""
    x, pad = image(layout, N, C, dtype=dtype), (R - 1) // 2
    P = (x.shape[2] + 2 * pad - R) // stride + 1
    return x, image(layout, N, O, P, dtype), ((R, R), (stride, stride), (pad, pad), (1, 1))


def conv_wgrad(layout, K, O=256, R=3, stride=1, N=128):
    x, dy, geometry = conv(layout, K, O, R, stride, N)
    return ops.conv_wgrad(ops.store_channels(x, ids(K), "planes"), dy, *geometry)


for kind in ("nchw", "nhwc"):
    for size, K in product((56, 28, 14, 7), (8, 32)):
        add(f"conv_wgrad 3x3 {kind}{size}", conv_wgrad, f"{kind}{size}", K)
    for K in (8, 32):
        add(f"conv_wgrad 3x3 {kind}14 one split", conv_wgrad, f"{kind}14", K, N=2)
    add(f"conv_wgrad 3x3 stride 2 {kind}56", conv_wgrad, f"{kind}56", 8, stride=2)
    add(f"conv_wgrad 7x7 stride 2 {kind}224", conv_wgrad, f"{kind}224", 3, R=7, stride=2)
    for K in (8, 16, 32, 64):
        add(f"conv_wgrad 2x2 stride 2 {kind}56", conv_wgrad, f"{kind}56", K, R=2, stride=2)
for size, K, O in product((56, 14), (8, 16, 32, 64), (16, 32)):
    add(f"conv_wgrad 2x2 stride 2 nchw{size}", conv_wgrad, f"nchw{size}", K, O, 2, 2)


def grouped_wgrad(layout, R, M=1, stride=1, dtype="bf16", codes=False):
    """24 channels of groups of M in and M out."""
    x, dy, geometry = conv(layout, 24, 24 * M, R, stride, dtype=dtype)
    store, options = ops.store_channels(x, ids(24), "planes"), {}
    if codes:
        store, options["scale"], options["zero"] = ops.quantize_channels(x, ids(24), "planes", 8)
    return ops.grouped_wgrad(store, dy, ids(24), (M, M), *geometry, **options)


def add_grouped(layout, R, M=1, stride=1, dtype="bf16", codes=False):
    label = f"{'depthwise' if M == 1 else 'grouped'}_wgrad {R}x{R} {f'stride {stride}' if stride > 1 else ''} {layout}"
    words = f"{dtype if dtype != 'bf16' else ''} {'codes' if codes else ''}"
    add(f"{label} {words}", grouped_wgrad, layout, R, M, stride, dtype, codes)


for size, R in product((112, 56, 28, 14, 7), (3, 5, 7)):
    add_grouped(f"nchw{size}", R)
for size, R in product((112, 56, 28, 14), (2, 3, 5)):
    add_grouped(f"nchw{size}", R, stride=2)
for size, R in product((56, 14), (3, 7)):
    add_grouped(f"nhwc{size}", R)
    add_grouped(f"nchw{size}", R, codes=True)
for size, stride in product((112, 56, 28, 14), (1, 2)):
    add_grouped(f"nchw{size}", 3, stride=stride, dtype="fp32")
for size in (56, 14, 7):
    add_grouped(f"nchw{size}", 7, dtype="fp32")
for size in (28, 7):
    add_grouped(f"nchw{size}", 2)
for R, M, dtype in product((3, 5, 7), (16, 32, 64), DTYPES):
    add_grouped("nchw28", R, M, dtype=dtype)
for layout, M in product(("nchw56", "nchw14", "nhwc56", "nhwc14"), (16, 64)):
    add_grouped(layout, 3, M)
add_grouped("nchw56", 3, 16, codes=True)


def source(layout, dtype):
    """What a store is made of: tokens, or images of 768 channels."""
    return empty(25088, 768, dtype=dtype) if layout == "tokens" else image(layout, 8, 768, dtype=dtype)


def store(layout, kept, K, dtype):
    return ops.store_channels(source(layout, dtype), ids(K), kept)


def quantize(layout, kept, K, bits, dtype="bf16", stochastic=True):
    return ops.quantize_channels(source(layout, dtype), ids(K), kept, bits, seed=seed(stochastic))


def dequantize(layout, kept, K, bits, dtype="bf16"):
    size = store(layout, kept, K, dtype).shape
    return ops.dequantize_channels(*quantize(layout, kept, K, bits), kept, bits, size, DTYPES[dtype])


KEPT = [("tokens", "tokens"), ("nchw56", "pixels"), ("nchw56", "planes"), ("nchw7", "planes"), ("nhwc56", "pixels")]
for layout, kept in [*KEPT, *((layout, "taps") for layout in ("nchw56", "nchw7", "nhwc56"))]:
    add(f"store {layout} to {kept}", store, layout, kept, 48, "bf16")
    for bits in (8, 4) if kept != "taps" else ():
        add(f"quantize {layout} to {kept} int{bits} stochastic", quantize, layout, kept, 48, bits)
for K, dtype in product((48, 8), DTYPES):
    add(f"store tokens to tokens {dtype}", store, "tokens", "tokens", K, dtype)
    for bits in (8, 4):
        add(f"quantize tokens to tokens int{bits} {dtype}", quantize, "tokens", "tokens", K, bits, dtype, False)
        add(f"dequantize tokens of tokens int{bits} {dtype}", dequantize, "tokens", "tokens", K, bits, dtype)
for (layout, kept), bits in product(KEPT[:4], (8, 4)):
    add(f"dequantize {kept} of {layout} int{bits}", dequantize, layout, kept, 48, bits)


def act_pack(kind, bits, dtype="bf16", stochastic=False):
    return ops.act_pack(empty(1 << 20, dtype=dtype), kind, bits, seed=seed(stochastic))


def act_unpack(kind, bits, dtype="bf16"):
    dy = empty(1 << 20, dtype=dtype)
    return ops.act_unpack(dy, act_pack(kind, bits)[1], kind, bits, dy.stride())


def act_store(kind, bits, kept="tokens", stochastic=False):
    x = source("tokens", "bf16") if kept == "tokens" else source("nhwc56", "bf16")
    return ops.act_store(x, ids(48), channel_slots(ids(48), 768), kept, kind, bits, seed=seed(stochastic))


for kind, bits in KINDS:
    add(f"pack {kind} {bits} bits", act_pack, kind, bits)
add("pack gelu 8 bits fp32", act_pack, "gelu", 8, "fp32")
add("pack gelu 8 bits stochastic", act_pack, "gelu", 8, stochastic=True)
for kind, bits in KINDS[:3]:
    add(f"unpack {bits} bits", act_unpack, kind, bits)
    for kept in ("tokens", "taps"):
        add(f"act_store {kind} {bits} bits {kept}", act_store, kind, bits, kept)
add("act_store gelu 8 bits tokens stochastic", act_store, "gelu", 8, stochastic=True)


def scatter_update(algorithm, dtype, stochastic=False, momentum=False, corrected=False):
    """Of two layers, as fake tensors fold tables of one."""
    weights, grads = [empty(64, 64, dtype=dtype)] * 2, [empty(16, 64, dtype="fp32")] * 2
    momenta, variances = grads if momentum or algorithm == "adamw" else [], grads if algorithm == "adamw" else []
    ops.scatter_update_(
        weights, grads, [ids(16)] * 2, empty(2, 7, dtype=torch.float64), momenta, variances, algorithm,
        found_inf=empty(1, dtype="fp32"), seed=seed(stochastic),
        corrections=empty(32, 2, dtype=torch.float64) if corrected else None,
    )  # fmt: skip


for words in ("sgd fp32", "sgd fp32 momentum", "sgd bf16 stochastic", "adamw fp32", "adamw fp32 corrected",
              "adamw bf16 stochastic"):  # fmt: skip
    algorithm, dtype, *options = words.split()
    add(f"scatter_update {words}", scatter_update, algorithm, dtype, **dict.fromkeys(options, True))


def splitk_reduce(n, taps=1, accumulate=False, dtype="fp32"):
    partials = empty(32, taps * n, dtype="fp32")
    splitk_reduce_launch(empty(n * taps, dtype=dtype), partials, accumulate, taps)


for n in (1000, 1_000_000):
    add("splitk_reduce", splitk_reduce, n)
    add("splitk_reduce bf16", splitk_reduce, n, dtype="bf16")
    add("splitk_reduce accumulate", splitk_reduce, n, accumulate=True)
    add("splitk_reduce 9 taps", splitk_reduce, n, 9)
