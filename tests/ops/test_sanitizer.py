"""On a device: compute-sanitizer finds no access outside a tensor and no race in any kernel of a training step."""

import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

STEP = """
import torch
import torch.nn.functional as F
from torch import nn
from trady_triton import TraDyOptimizer, apply_plan, make_plan, rank_layers, remove_plan

torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU6(), nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.Hardswish(),
    nn.Conv2d(24, 40, 1), nn.ReLU(), nn.Conv2d(40, 48, 3, 2, 1, groups=4), nn.Flatten(2), nn.Linear(49, 33), nn.GELU(),
    nn.Flatten(), nn.Linear(48 * 33, 10),
).cuda()
x, y = torch.randn(4, 3, 28, 28, device="cuda"), torch.arange(4, device="cuda")
ranking = rank_layers(net, [(x, y)], F.cross_entropy, head=["11"])
for store in ("same", "int8", "int4"):
    plan = make_plan(ranking, budget="1MiB", coverage=1.0, batch_size=4, store=store)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan)
    optimizer.resample(0)
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    remove_plan(net)
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_a_step_is_clean(tool, tmp_path):
    script = tmp_path / "step.py"
    script.write_text(STEP)
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
