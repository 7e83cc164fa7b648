"""`trady finetune` killed without warning in mid-epoch, and resumed: bit for bit the uninterrupted run."""

import json
import os
import subprocess
import sys
import time

import pytest
from app_files import write_npz

from trady_triton.app.checkpoint import Checkpoint

STEPS = 30  # in an epoch


@pytest.fixture
def finetune(tmp_path):
    """Start `trady finetune` as a process of its own; the network drops out, images are augmented."""
    data = write_npz(tmp_path / "data.npz", train=4 * STEPS)
    options = ["--budget", "3000", "--batch-size", "4", "--image-size", "32", "--epochs", "2", "--augment"]
    options += ["--data", str(data), "--model-args", '{"drop_rate": 0.3}']

    def start(folder, *arguments):
        main = [sys.executable, "-c", "from trady_triton.app.cli import main; main()"]
        command = [*main, "finetune", "test_efficientnet", *options, "--out", str(tmp_path / folder), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    return start


def finished(process):
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stderr


def kill_once_saved(process, checkpoint, epoch, step):
    """SIGKILL as soon as a checkpoint is that far."""
    deadline = time.monotonic() + 120
    while progress(checkpoint) < (epoch, step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -9


def progress(checkpoint):
    try:
        saved = Checkpoint.load(checkpoint)
    except FileNotFoundError:  # not yet, or just being replaced
        return (0, 0)
    return (saved.epoch, saved.step)


def untimed(log):
    return [{**json.loads(line), "seconds": 0} for line in log.read_text().splitlines()]


def test_a_run_killed_in_mid_epoch_goes_on_bit_for_bit(finetune, tmp_path):
    whole = finetune("whole", "--checkpoint-every", "never")
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    kill_once_saved(finetune("killed", "--checkpoint-every", "1"), checkpoint, epoch=1, step=2)
    saved = Checkpoint.load_newest(checkpoint)
    assert (saved.epoch, 0 < saved.step < STEPS) == (1, True)
    assert "resumed after 1 epochs and" in finished(finetune("killed", "--resume"))
    finished(whole)
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert untimed(tmp_path / "killed" / "log.jsonl") == untimed(tmp_path / "whole" / "log.jsonl")
