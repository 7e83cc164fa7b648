"""On a device: compute-sanitizer finds no access outside a tensor and no race in any kernel of a training step."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trady_triton import ops

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SOURCES = "".join(file.read_text() for file in Path(ops.__file__).parent.glob("*.py"))
KERNELS = re.findall(r"^def (_\w+_kernel)\(", SOURCES, re.MULTILINE)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_a_step_is_clean(tool):
    """Of our kernels alone: libraries are not clean, and triton asks the driver what it answers by an error."""
    command = ["compute-sanitizer", "--tool", tool, sys.executable, "-m", "tests.ops.device_net"]
    # each tensor an allocation of its own: in those of the caching allocator an access past the end goes unnoticed
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRADY_TRITON_BACKEND": "auto"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-4000:]
    assert "ERROR SUMMARY" in report or "RACECHECK SUMMARY" in report, report[-4000:]
    found = [line for line in report.splitlines() if any(kernel in line for kernel in KERNELS)]
    assert not found, "\n".join(found[:40])
