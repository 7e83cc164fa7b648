"""Every tile that the rules ship, by select_config for all sizes that nets ask for: calls.py has to launch each."""

from itertools import product

import torch
from pretended import DEVICES

from trady_triton.ops.select_config import Arch, select_config

POWERS = [1 << i for i in range(13)]
PIXELS = (1, 49, 196, 784, 3136)
SIZES = {
    "token_wgrad": {"T": (100, 25088, 10**6), "O": POWERS, "K": POWERS[:10], "PQ": PIXELS, "bits": (0, 4, 8)},
    "wgrad_sqnorm": {"T": (25088,), "C": POWERS, "O": (*POWERS, 12000, 17408, 24000, 50000)},
    "conv_wgrad": {"T": (100, 25088), "O": POWERS, "K": POWERS[:10], "TAPS": (2, 4, 9, 25, 49), "PQ": PIXELS[1:]},
    "grouped_wgrad": {"T": (25088,), "K": (8, 32), "M": POWERS[:9], "TAPS": (1, 4, 9, 25, 49, 121)},
    "depthwise_wgrad": {"ROWS": (8,), "N": (128,), "P": (56,), "Q": (4, 7, 14, 28, 56, 112), "S": (2, 3, 5, 7),
                        "STRIDE_W": (1, 2), "DILATION_W": (1,)},
    "store": {"K": (8, 48)},
    "quantize": {"K": (8, 48), "bits": (4, 8)},
    "dequantize": {"K": (8, 48)},
    "splitk_reduce": {"n": (1000, 10**6), "TAPS": (1, 9)},
}  # fmt: skip


def _apart(kernel, sizes):
    """What compiles apart beside the tile: the bits of codes; one matrix, or planes with rows at any address or not."""
    if "PQ" not in SIZES.get(kernel, ()):
        return ()
    return sizes.get("bits", sizes.get("BITS", 0)), sizes["PQ"] == 1, sizes["PQ"] % 4 == 0


def config_of(launch):
    """What the launch has of a config, and whether it reads or writes fp32."""
    pointers = dict(launch.signature)
    typed = next((name for name in ("dy_ptr", "x_ptr", "out_ptr") if name in pointers), None)
    options = launch.options.num_warps, launch.options.num_stages, pointers.get(typed) == "*fp32"
    return launch.name, tuple(launch.tile.items()), *options, *_apart(launch.name, launch.constants)


def shipped(arch):
    """The configs of the rules on a device, as `config_of` has them; where cuBLAS is faster there is no tile."""
    device = Arch(arch, DEVICES[arch].multi_processor_count)
    for kernel, sizes in SIZES.items():
        for values, dtype in product(product(*sizes.values()), (torch.bfloat16, torch.float32)):
            shape = dict(zip(sizes, values, strict=True))
            if kernel == "depthwise_wgrad":
                shape |= {"R": shape["S"], "LEFT": (shape["S"] - 1) // 2, "W": shape["Q"] * shape["STRIDE_W"]}
            config = select_config(kernel, shape, dtype, device)
            if config.backend == "triton":
                options = config.num_warps, config.num_stages, dtype == torch.float32
                yield kernel, tuple(config.meta.items()), *options, *_apart(kernel, shape)


def missing(arch, launches):
    """A sentence for each shipped config that no launch has."""
    left = dict.fromkeys(shipped(arch)).keys() - map(config_of, launches)
    return [f"{arch}: calls.py launches nothing with {config}" for config in sorted(left)]
