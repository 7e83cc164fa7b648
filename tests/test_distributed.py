"""Training on two processes, started by torchrun: each file of `distributed` holds many checks for one launch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed.saved import ADAMW, load, planned, save, train
from toys import toy_batches

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
    assert torchrun("ddp.py").count("passed") == 2 * 15


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_fully_shard_equals_one_process_and_checkpoints_go_from_one_to_two_and_back(tmp_path):
    batch = toy_batches(size=8)[0]
    net, optimizer = planned(**ADAMW)
    for epoch in range(2):
        optimizer.resample(epoch)
        train(net, optimizer, batch)
    save(net, optimizer, tmp_path / "one")
    assert torchrun("fsdp.py", tmp_path).count("passed") == 2 * 6
    train(net, optimizer, batch)  # what two processes did with the checkpoint
    other, resumed = planned(**ADAMW)
    with pytest.raises(ValueError, match="state of"):
        load(other, resumed, tmp_path / "two")  # without the channels its states would be lost
    resumed.resample(1)
    load(other, resumed, tmp_path / "two")
    for model, opt in ((net, optimizer), (other, resumed)):
        opt.resample(2)
        train(model, opt, batch)
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(tensor, net.state_dict()[name], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_checkpoints_of_plain_sgd_need_no_draw_before(tmp_path):
    net, optimizer = planned()
    optimizer.resample(3)
    train(net, optimizer, toy_batches()[0])
    save(net, optimizer, tmp_path)
    other, resumed = planned()
    load(other, resumed, tmp_path)
    assert resumed.epoch == 3
    for model, opt in ((net, optimizer), (other, resumed)):
        train(model, opt, toy_batches()[0])
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in other.state_dict().items())
