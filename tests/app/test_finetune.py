import json
import os
import signal
from dataclasses import replace

import pytest
import timm
import torch

from trady_triton import make_plan
from trady_triton.app.checkpoint import Checkpoint, previous
from trady_triton.app.data import load_data
from trady_triton.app.finetune import Interval, Run, Settings
from trady_triton.app.loader import Batches
from trady_triton.app.planning import rank_on_noise
from trady_triton.app.train import OPTIMIZERS


@pytest.fixture
def make(npz, tmp_path):
    """A run in its own folder; the network drops out, so that a forgotten random state would show."""

    def run(folder, method="trady", budget=20000, save_every="never", **options):
        torch.manual_seed(0)
        net = timm.create_model("test_efficientnet", num_classes=3, drop_rate=0.2)
        settings = Settings(
            "test_efficientnet", str(npz), method, epochs=4, lr=0.1, batch_size=5, image_size=32, augment=True
        )
        settings = replace(settings, **options)
        batches = Batches.for_model(load_data(str(npz)), net, image_size=32, batch_size=5, augment=True)
        plan = None
        if method == "trady":
            plan = make_plan(rank_on_noise(net, 32), budget=budget, optimizer=settings.optimizer)
        return Run(net, batches, settings, tmp_path / folder, plan, Interval.parse(save_every))

    return run


def stop_after(steps):
    """A callback that presses Ctrl-C in the course of a step."""
    count = 0

    def on_step(result):
        nonlocal count
        count += 1
        if count == steps:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def untimed(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.mark.parametrize("method", ["trady", "full", "head"])
def test_a_run_stopped_between_epochs_goes_on_bit_for_bit(make, method):
    whole = make("whole", method)
    records = whole.train()
    with pytest.raises(KeyboardInterrupt):
        make("parts", method).train(stop_after(8))
    torch.manual_seed(99)
    second = make("parts", method)
    second.resume()
    assert (second.epoch, second.step) == (2, 0)
    assert untimed(second.train()) == untimed(records)
    state = whole.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.model.state_dict().items())


@pytest.mark.parametrize(("method", "optimizer"), [("trady", o) for o in OPTIMIZERS] + [("full", "adamw")])
def test_a_run_stopped_inside_an_epoch_goes_on_bit_for_bit(make, method, optimizer):
    options = {"method": method, "optimizer": optimizer, "lr": 0.01}
    whole = make("whole", **options)
    records = whole.train()
    with pytest.raises(KeyboardInterrupt):
        make("parts", **options).train(stop_after(6))
    second = make("parts", **options)
    second.resume()
    assert (second.epoch, second.step) == (1, 2)
    assert untimed(second.train()) == untimed(records)
    state = whole.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.model.state_dict().items())


def test_ctrl_c_saves_the_step_under_way(make):
    run = make("run")
    with pytest.raises(KeyboardInterrupt):
        run.train(stop_after(3))
    saved = Checkpoint.load(run.out / "checkpoint.pt")
    assert (saved.epoch, saved.step) == run.saved == (0, 3)
    assert all(torch.equal(tensor, saved.model[name]) for name, tensor in run.model.state_dict().items())


@pytest.fixture
def usual_interrupt():
    """Python's own answer to SIGINT, which a process started in the background is told to ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_interrupt")
def test_a_second_ctrl_c_stops_at_once(make):
    def twice(result):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run = make("run")
    with pytest.raises(KeyboardInterrupt):
        run.train(twice)
    assert run.saved is None


def places(run):
    """Where the run's checkpoints were taken: pairs of epoch and step."""
    taken = []
    save = run.save
    run.save = lambda: (save(), taken.append(run.saved))
    run.train()
    return taken


def test_checkpoints_inside_an_epoch_are_counted_in_steps(make):
    assert places(make("run", epochs=2, save_every="3")) == [(0, 3), (1, 0), (1, 3), (2, 0)]


def test_checkpoints_inside_an_epoch_are_counted_in_time(make, monkeypatch):
    clock = iter(range(0, 10**6, 25))
    monkeypatch.setattr("trady_triton.app.finetune.time.monotonic", lambda: next(clock))
    assert places(make("run", epochs=1, save_every="1min")) == [(0, 3), (1, 0)]
    assert places(make("other", epochs=1)) == [(1, 0)]


@pytest.mark.parametrize("text", ["0", "-3", "5 min", "1d", "", "3.5"])
def test_an_interval_that_is_none_is_an_error(text):
    with pytest.raises(ValueError, match="--checkpoint-every"):
        Interval.parse(text)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(make):
    whole = make("whole")
    records = whole.train()
    with pytest.raises(KeyboardInterrupt):
        make("parts", save_every="1").train(stop_after(7))
    second = make("parts")
    path = second.out / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    notes = []
    second.resume(notes.append)
    assert (second.epoch, second.step) == (1, 2)
    assert "checkpoint.pt: truncated" in notes[0]
    assert untimed(second.train()) == untimed(records)
    state = whole.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.model.state_dict().items())


def test_a_new_run_leaves_no_checkpoint_of_the_one_before(make):
    make("run", epochs=2).train()
    make("run", epochs=1).train()
    assert not previous(make("run").out / "checkpoint.pt").exists()


def test_the_handler_of_ctrl_c_comes_back(make):
    before = signal.getsignal(signal.SIGINT)
    make("run", epochs=1).train()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_log_has_a_line_an_epoch(make):
    run = make("run")
    records = run.train()
    lines = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    assert lines == records
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert set(lines[0]) == {"epoch", "loss", "train_accuracy", "test_accuracy", "lr", "steps", "seconds"}


def test_log_lines_of_an_epoch_that_was_not_saved_are_replaced(make):
    run = make("run", epochs=2)
    run.train()
    with (run.out / "log.jsonl").open("a") as log:
        log.write('{"epoch": 2}\n')
    second = make("run", epochs=2)
    second.resume()
    assert len(second.records) == 2


def test_a_finished_run_has_nothing_left_to_do(make):
    records = make("run").train()
    second = make("run")
    second.resume()
    assert second.train(stop_after(1)) == records


def test_only_drawn_columns_and_the_head_move(make):
    run = make("run", epochs=1)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.train()
    pooled = {f"{name}.weight" for name in run.plan.pool} | {"classifier.weight", "classifier.bias"}
    moved = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"classifier.weight", "classifier.bias"} < moved <= pooled


@pytest.mark.parametrize("change", [{"lr": 0.2}, {"epochs": 5}, {"max_grad_norm": 1.0}])
def test_resuming_with_other_settings_is_an_error(make, change):
    make("run", epochs=1).train()
    (name, value), *_ = change.items()
    with pytest.raises(ValueError, match=rf"that run had {name} = .*, this one has {value}"):
        make("run", **{"epochs": 1, **change}).resume()


def test_resuming_with_another_plan_is_an_error(make):
    make("run", epochs=1).train()
    with pytest.raises(ValueError, match="the state belongs to plan"):
        make("run", epochs=1, budget=10000).resume()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "x"}, "--method 'x': wanted one of trady"),
        ({"optimizer": "x"}, "--optimizer 'x': wanted one of sgd, momentum, adamw"),
        ({"epochs": 0}, "--epochs 0"),
        ({"warmup": 2}, "--warmup 2"),
    ],
)
def test_settings_out_of_range_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        Settings("net", "digits", **change)
