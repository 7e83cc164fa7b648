"""One scratch buffer of at most 8 MiB for each (device, stream), shared by every two-pass op that runs on that stream.

Work on one stream is in order, so the next op may overwrite it as soon as the reduction of the last one is launched.
The autograd engine runs backward on another thread but on the stream of the forward, so threads are not in the key.
"""

from __future__ import annotations

import torch

from trady_triton.ops.select_config import MAX_WORKSPACE_BYTES, next_power_of_2

_BUFFERS: dict[tuple[torch.device, int], torch.Tensor] = {}


def workspace(device: torch.device, numel: int) -> torch.Tensor:
    """An uninitialised fp32 vector [numel], valid until the next call for this stream.

    Raises: ValueError above 8 MiB; a configuration has to split less instead.
    """
    num_bytes = 4 * numel
    if num_bytes > MAX_WORKSPACE_BYTES:
        raise ValueError(f"workspace: got {num_bytes} bytes, wanted at most {MAX_WORKSPACE_BYTES}")
    if device.type != "cuda":
        return torch.empty(numel, dtype=torch.float32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    buffer = _BUFFERS.get(key)
    if buffer is None or buffer.numel() < numel:
        buffer = torch.empty(next_power_of_2(numel), dtype=torch.float32, device=device)
        _BUFFERS[key] = buffer
    return buffer[:numel]
