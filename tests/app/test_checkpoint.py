import os
import pickle
import random

import pytest
import torch
from toys import toy_net, toy_plan

from trady_triton.app.checkpoint import Checkpoint, previous
from trady_triton.app.train import make_optimizer, make_scheduler


@pytest.fixture
def parts(net):
    optimizer = make_optimizer(net, "full", lr=0.1)
    return net, optimizer, make_scheduler(optimizer, steps=10)


@pytest.fixture
def saved(parts, tmp_path):
    path = tmp_path / "checkpoint.pt"
    Checkpoint.take({"lr": 0.1}, *parts, epoch=3, step=2, tally={}).save(path)
    return path


def test_a_restored_state_is_the_saved_one(parts, saved):
    net, optimizer, scheduler = parts
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    drawn = torch.rand(3), random.random()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    scheduler.step_update(7)
    scheduler.base_values = [9.0]
    checkpoint = Checkpoint.load(saved)
    checkpoint.restore(net, optimizer, scheduler)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert scheduler.base_values == [0.1]
    assert (checkpoint.run, checkpoint.epoch, checkpoint.step) == ({"lr": 0.1}, 3, 2)
    assert torch.equal(torch.rand(3), drawn[0])
    assert random.random() == drawn[1]


def test_an_interrupted_write_leaves_the_older_file(parts, saved, monkeypatch):
    def interrupted(content, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Checkpoint.take({}, *parts, epoch=4, step=0, tally={}).save(saved)
    assert Checkpoint.load(saved).epoch == 3


def test_a_full_disk_is_told_and_leaves_the_older_file(parts, saved):
    resource = pytest.importorskip("resource", reason="files are limited on POSIX systems only")
    older = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(older) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt could not be written, is the disk full"):
            Checkpoint.take({}, *parts, epoch=4, step=0, tally={}).save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == older
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_an_error(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"checkpoint\.pt: truncated, damaged"):
        Checkpoint.load(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, "not a checkpoint of this program"),
        ([1, 2], "not a checkpoint of this program"),
        ({"format": "trady_triton.checkpoint", "version": 99}, "version 99, this program reads version 3"),
        ({"format": "trady_triton.checkpoint", "version": 3, "run": {}}, "damaged"),
    ],
)
def test_a_foreign_file_is_an_error(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        Checkpoint.load(tmp_path / "x.pt")


@pytest.mark.parametrize("change", [{"run": 3}, {"epoch": "1"}, {"optimizer": {}}, {"random": {}}])
def test_a_file_with_the_wrong_things_in_it_is_an_error(parts, saved, change):
    torch.save(torch.load(saved) | change, saved)
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint.load(saved).restore(*parts)


class Harmful:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def test_loading_runs_nothing_that_the_file_contains(tmp_path):
    torch.save({"format": Harmful(tmp_path / "made")}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Harmful(tmp_path / "made"), protocol=2))
    for name in ("x.pt", "y.pt"):
        with pytest.raises(ValueError, match="no file of tensors"):
            Checkpoint.load(tmp_path / name)
    assert not (tmp_path / "made").exists()


def save(path, parts, epoch):
    Checkpoint.take({}, *parts, epoch=epoch, step=0, tally={}).save(path)


def test_the_file_before_is_kept_and_taken_where_the_newest_is_damaged(parts, saved):
    save(saved, parts, 4)
    assert Checkpoint.load(previous(saved)).epoch == 3
    assert Checkpoint.load_newest(saved).epoch == 4
    saved.write_bytes(saved.read_bytes()[:3000])
    notes = []
    assert Checkpoint.load_newest(saved, notes.append).epoch == 3
    (note,) = notes
    assert f"{saved}: truncated, damaged" in note
    assert note.endswith(f"going back to {previous(saved)}")
    save(saved, parts, 5)
    assert Checkpoint.load(previous(saved)).epoch == 3  # the damaged one did not take its place
    assert saved.with_name("checkpoint.pt.damaged").stat().st_size == 3000


def test_the_file_before_is_taken_where_the_newest_is_gone(parts, saved):
    save(saved, parts, 4)
    saved.unlink()
    assert Checkpoint.load_newest(saved).epoch == 3


def test_where_both_files_are_damaged_the_newest_is_named_and_left_alone(parts, saved):
    save(saved, parts, 4)
    for path in (saved, previous(saved)):
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: truncated"):
        Checkpoint.load_newest(saved)
    assert saved.read_bytes() == b"damaged"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
        Checkpoint.load(tmp_path / "none.pt")


def test_a_file_that_goes_while_it_is_read_is_missing_and_not_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: True)
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
        Checkpoint.load(tmp_path / "none.pt")


def test_a_checkpoint_of_another_model_is_an_error(parts, saved):
    net, optimizer, scheduler = parts
    net.reset_classifier(7)
    with pytest.raises(ValueError, match="another model"):
        Checkpoint.load(saved).restore(net, optimizer, scheduler)


def test_a_checkpoint_of_another_plan_changes_nothing():
    def run(budget):
        net = toy_net()
        optimizer = make_optimizer(net, "trady", lr=0.1, plan=toy_plan(net, budget))
        return net, optimizer, make_scheduler(optimizer, steps=10)

    checkpoint = Checkpoint.take({}, *run(1200), epoch=0, step=0, tally={})
    net, *others = run(900)
    torch.nn.init.zeros_(net.stem.weight)
    with pytest.raises(ValueError, match="belongs to plan"):
        checkpoint.restore(net, *others)
    assert not net.stem.weight.any()
