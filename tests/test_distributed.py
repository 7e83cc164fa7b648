"""Training on two processes, started by torchrun: each file of `distributed` holds many checks for one launch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

FOLDER = Path(__file__).parent / "distributed"

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch was built without gloo"
)


def torchrun(name, *arguments):
    """What a file printed on two processes; its failure is ours."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", FOLDER / name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def test_distributed_data_parallel_equals_one_process_on_the_joined_batch():
    assert torchrun("ddp.py").count("passed") == 2 * 9
