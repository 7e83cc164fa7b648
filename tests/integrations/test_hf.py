"""Transformers: BERT under a plan, and Trainer with the callback."""

from dataclasses import asdict

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
pytest.importorskip("accelerate", reason="accelerate is not installed (extra hf)")

from integrations.bert import bert, collate, loss_of, planned, sentences
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.activations import GELUActivation

from trady_triton import TraDyOptimizer, apply_plan, choose_recompute, ledger, make_plan, measure, rank_layers
from trady_triton.integrations.hf import TraDyCallback
from trady_triton.nn import LeanLinear


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def trainer(folder, net, optimizer, callback, **options):
    return Trainer(
        net,
        arguments(folder, **options),
        train_dataset=sentences(),
        data_collator=collate,
        optimizers=(optimizer, None),
        callbacks=[callback, *options.pop("callbacks", ())],
    )


class Recorder(TrainerCallback):
    """The draw that each step was trained with, by its number."""

    def __init__(self, optimizer, stop_at=None):
        self.optimizer, self.stop_at, self.epochs = optimizer, stop_at, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs[state.global_step] = self.optimizer.epoch
        control.should_training_stop = state.global_step == self.stop_at


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


def hand_written(net, plan, rounds, accumulate=1, clip=0.3):
    """The loop that Trainer must equal: one draw after another, each for some batches."""
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.3)
    items = sentences()
    net.train()
    for draw, starts in rounds:
        optimizer.resample(draw)
        for start in starts:
            optimizer.zero_grad()
            parts = [items[i : i + 4] for i in range(start, min(start + 4 * accumulate, len(items)), 4)]
            for part in parts:
                (net(**collate(part)).loss / len(parts)).backward()
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
            optimizer.step()
    return net


@pytest.mark.parametrize(("accumulate", "starts"), [(1, range(0, 24, 4)), (4, (0, 16))])
def test_trainer_equals_a_loop_written_by_hand(tmp_path, accumulate, starts):
    net, plan = planned()
    options = {"max_grad_norm": 0.3, "gradient_accumulation_steps": accumulate}
    run = trainer(tmp_path, net, TraDyOptimizer(net.parameters(), plan, lr=0.3), TraDyCallback(), **options)
    run.train()
    assert run.args.max_grad_norm == 0.3
    reference = hand_written(apply_plan(bert(), plan), plan, [(epoch, starts) for epoch in range(2)], accumulate)
    assert not same(net, bert())
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_trainer_makes_the_optimizer_itself(tmp_path):
    net, plan = planned()
    run = Trainer(
        net,
        arguments(tmp_path, max_grad_norm=0.3),
        train_dataset=sentences(),
        data_collator=collate,
        optimizer_cls_and_kwargs=(TraDyOptimizer, {"lr": 0.3}),
        callbacks=[TraDyCallback()],
    )
    run.train()
    reference = hand_written(apply_plan(bert(), plan), plan, [(epoch, range(0, 24, 4)) for epoch in range(2)])
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("every", "draws"), [("epoch", [0] * 6 + [1] * 6), (4, [0] * 4 + [1] * 4 + [2] * 4)])
def test_channels_are_drawn_by_epoch_or_by_step(tmp_path, every, draws):
    net, plan = planned()
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.3)
    run, record = trainer(tmp_path, net, optimizer, TraDyCallback(every), max_grad_norm=0.3), Recorder(optimizer)
    run.add_callback(record)
    run.train()
    assert list(record.epochs.values()) == draws


@pytest.mark.parametrize("every", ["epoch", 4])
def test_a_run_stopped_in_mid_epoch_goes_on_bit_for_bit(tmp_path, every):
    def start(folder, stop_at=None):
        net, plan = planned(dropout=0.1)
        optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.3)
        record = Recorder(optimizer, stop_at)
        options = {"save_strategy": "steps", "save_steps": 9, "train_sampling_strategy": "random"}
        run = trainer(tmp_path / folder, net, optimizer, TraDyCallback(every), **options)
        run.add_callback(record)
        return run, net, record

    whole, expected, all_epochs = start("whole")
    whole.train()
    stopped, _, _ = start("parts", stop_at=9)
    stopped.train()
    torch.manual_seed(99)
    resumed, net, record = start("parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-9"))
    assert record.epochs == {step: epoch for step, epoch in all_epochs.epochs.items() if step > 9}
    assert same(net, expected)


def test_another_optimizer_is_refused(tmp_path):
    net = bert()
    with pytest.raises(TypeError, match="optimizer of type SGD: wanted a TraDyOptimizer"):
        trainer(tmp_path, net, torch.optim.SGD(net.parameters()), TraDyCallback()).train()


@pytest.mark.parametrize("every", ["step", 0, -1, True, 2.5, None])
def test_an_interval_that_is_none_is_an_error(every):
    with pytest.raises(ValueError, match="every"):
        TraDyCallback(every)


def test_bert_is_lean_and_its_ledger_right():
    net, plan = planned()
    batch = collate(sentences(8))
    batch["attention_mask"][0, -1] = 0  # without padding BERT keeps no mask, which the prediction cannot know
    attention = net.bert.encoder.layer[0].attention.self
    assert all(isinstance(layer, LeanLinear) for layer in (attention.query, attention.key, attention.value))
    predicted = ledger(bert(), plan, batch, loss_fn=loss_of)
    assert "BertSelfAttention" in predicted.not_lean
    assert GELUActivation.__name__ not in predicted.not_lean
    optimizer = TraDyOptimizer(net.parameters(), plan)
    optimizer.resample(0)
    assert asdict(predicted) == asdict(measure(net, optimizer, batch, batch, loss_fn=loss_of))
    full = ledger(bert(), None, batch, loss_fn=loss_of)
    again = ledger(bert(), choose_recompute(plan, bert(), batch), batch, loss_fn=loss_of)
    assert again.kept_bytes < predicted.kept_bytes < full.kept_bytes


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_bert_are_those_of_dense_autograd(recompute):
    net = bert(dtype=torch.float64)
    batch = collate(sentences(8))
    plan = make_plan(rank_layers(net, [batch], loss_of), budget=1500)
    plan = choose_recompute(plan, net, batch, least_gain=0.1) if recompute else plan
    assert bool(plan.policy.recompute) == recompute
    optimizer = TraDyOptimizer(apply_plan(net, plan).parameters(), plan)
    drawn = optimizer.resample(0)
    net(**batch).loss.backward()
    dense = bert(dtype=torch.float64)
    dense(**batch).loss.backward()
    for name, channels in drawn.items():
        slot = net.get_submodule(name).weight.trady_slot.slot
        expected = dense.get_submodule(name).weight.grad[:, list(channels)].T
        torch.testing.assert_close(slot.proxy.grad, expected, rtol=1e-10, atol=1e-14)
