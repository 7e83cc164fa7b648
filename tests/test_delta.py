"""save_delta and apply_delta: bit for bit, small, and nothing for another base."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_optimizer import planned, train_step
from toys import toy_batches, toy_net

from trady_triton import TraDyOptimizer, apply_delta, apply_plan, make_plan, rank_layers, remove_plan, save_delta


def trained(epochs=2, **options):
    """A toy net after some epochs, and its plan; its base is `toy_net()`."""
    net, plan, optimizer = planned(**options)
    for epoch in range(epochs):
        optimizer.resample(epoch)
        for batch in toy_batches(2):
            train_step(net, optimizer, batch)
    return net, plan


def same(one, other):
    """Equal bit for bit, by name."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)) for name in one
    )


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_base_and_delta_give_the_trained_model_bit_for_bit(tmp_path):
    net, plan = trained()
    save_delta(tmp_path / "d.safetensors", toy_net(), net)
    other = toy_net()
    assert not same(other, net)
    assert apply_delta(other, tmp_path / "d.safetensors") is other
    assert same(other, net)
    assert metadata(tmp_path / "d.safetensors")["plan"] == plan.fingerprint


def test_only_drawn_channels_and_the_head_are_in_the_file(tmp_path):
    net, plan = trained()
    save_delta(tmp_path / "d.safetensors", toy_net(), net)
    content = load_file(tmp_path / "d.safetensors")
    assert {key for key in content if key.startswith("whole/")} == {"whole/head.weight", "whole/head.bias"}
    drawn = {name: set(plan.sample(0)[name]) | set(plan.sample(1)[name]) for name in plan.pool}
    for name in plan.pool:
        channels = content.get(f"channels/{name}.weight", torch.zeros(0)).tolist()
        assert set(channels) <= drawn[name]
        if channels:
            layer = net.get_submodule(name)
            kernel = layer.weight.shape[2:]
            rows = layer.weight.shape[0] // getattr(layer, "groups", 1)
            assert content[f"values/{name}.weight"].shape == (len(channels), rows, *kernel)
    assert any(f"channels/{name}.weight" in content for name in ("depthwise", "grouped"))


def test_the_file_may_be_read_by_those_who_may_read_others(tmp_path):
    (tmp_path / "other").touch()
    save_delta(tmp_path / "d.safetensors", toy_net(), trained()[0])
    assert (tmp_path / "d.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_size_is_reported_against_a_full_checkpoint(tmp_path):
    size = save_delta(tmp_path / "d.safetensors", toy_net(), trained()[0])
    save_file(toy_net().state_dict(), tmp_path / "full.safetensors")
    assert size.delta_bytes == (tmp_path / "d.safetensors").stat().st_size
    tensors = sum(tensor.nbytes for tensor in toy_net().state_dict().values())
    assert size.full_bytes == tensors <= (tmp_path / "full.safetensors").stat().st_size
    assert (
        str(size)
        == f"{size.delta_bytes:,} bytes, {size.delta_bytes / tensors:.1%} of the {tensors:,} bytes of a full checkpoint"
    )


def test_a_base_with_another_random_head_is_the_same_base(tmp_path):
    net, _ = trained()
    save_delta(tmp_path / "d.safetensors", toy_net().state_dict(), net)
    other = toy_net()
    torch.nn.init.normal_(other.head.weight)
    assert same(apply_delta(other, tmp_path / "d.safetensors"), net)


def test_a_classifier_of_another_size_than_the_base_s(tmp_path):
    torch.manual_seed(0)
    base = timm.create_model("test_efficientnet", num_classes=7)
    net = copy.deepcopy(base)
    net.reset_classifier(3)
    with torch.no_grad():
        net.conv_stem.weight[:, 1] += 1
    save_delta(tmp_path / "d.safetensors", base, net)
    base.reset_classifier(3)
    assert same(apply_delta(base, tmp_path / "d.safetensors"), net)
    content = load_file(tmp_path / "d.safetensors")
    assert set(content) == {
        "channels/conv_stem.weight",
        "values/conv_stem.weight",
        "whole/classifier.weight",
        "whole/classifier.bias",
    }


@pytest.mark.parametrize("layer", ["stem", "tokens"])
def test_another_base_is_refused_and_nothing_changes(tmp_path, layer):
    net, _ = trained()
    save_delta(tmp_path / "d.safetensors", toy_net(), net)
    other = toy_net()
    with torch.no_grad():
        other.get_submodule(layer).weight.flatten()[0] += 1e-12
    before = copy.deepcopy(other)
    wanted = metadata(tmp_path / "d.safetensors")["base"]
    with pytest.raises(ValueError, match=rf"made for the base {wanted}, this model is [0-9a-f]{{16}}"):
        apply_delta(other, tmp_path / "d.safetensors")
    assert same(other, before)


def test_a_model_of_other_shapes_is_refused_by_name(tmp_path):
    save_delta(tmp_path / "d.safetensors", toy_net(), trained()[0])
    other = toy_net()
    other.head = torch.nn.Linear(9, 4).double()
    with pytest.raises(ValueError, match=r"'head.bias' is float64 \(5,\) in the first and float64 \(4,\)"):
        apply_delta(other, tmp_path / "d.safetensors")
    other = toy_net()
    del other.tokens
    with pytest.raises(ValueError, match=r"'tokens.weight' is .* and missing in the second"):
        apply_delta(other, tmp_path / "d.safetensors")


def test_saving_against_a_base_that_does_not_fit_writes_nothing(tmp_path):
    larger = toy_net()
    larger.more = torch.nn.Linear(2, 2)
    for base, wrong in (
        (toy_net().float(), r"'stem.weight' is float32"),
        (torch.nn.Sequential(toy_net()), r"'stem.weight' is missing"),
        (larger, r"'more.weight' is float32 \(2, 2\) in the first and missing in the second"),
    ):
        with pytest.raises(ValueError, match=wrong):
            save_delta(tmp_path / "d.safetensors", base, trained()[0])
    assert not list(tmp_path.iterdir())


def test_buffers_biases_and_bits_are_followed(tmp_path):
    net = toy_net()
    with torch.no_grad():
        net.norm.running_mean += 1
        net.norm.num_batches_tracked += 1
        net.pointwise.bias[0] = float("nan")
        net.stem.weight[0, 0, 0, 0] = 0.0
    base = copy.deepcopy(net)
    with torch.no_grad():
        net.norm.running_mean += 1
        net.norm.num_batches_tracked += 1
        net.stem.weight[0, 0, 0, 0] = -0.0
        net.grouped.bias += 1
    save_delta(tmp_path / "d.safetensors", base, net)
    whole = {"norm.running_mean", "norm.num_batches_tracked", "grouped.bias"}
    assert set(load_file(tmp_path / "d.safetensors")) == {
        *(f"whole/{name}" for name in whole),
        "channels/stem.weight",
        "values/stem.weight",
    }
    assert same(apply_delta(base, tmp_path / "d.safetensors"), net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_planned_model_takes_a_delta_and_trains_on(tmp_path, dtype):
    batch = [(x.to(dtype), y) for x, y in toy_batches()]
    plan = make_plan(
        rank_layers(toy_net(torch.float32), toy_batches(dtype=torch.float32), F.cross_entropy), budget=1200
    )
    net = apply_plan(toy_net(dtype), plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    optimizer.resample(0)
    train_step(net, optimizer, batch[0])
    save_delta(tmp_path / "d.safetensors", toy_net(dtype), net)
    other = apply_plan(toy_net(dtype), plan)
    apply_delta(other, tmp_path / "d.safetensors")
    optimizers = optimizer, TraDyOptimizer(other.parameters(), plan, lr=0.1)
    for model, opt in zip((net, other), optimizers, strict=True):
        opt.resample(1)
        train_step(model, opt, batch[0])
    assert same(net, other)


def test_a_model_without_its_plan_can_be_saved(tmp_path):
    net, _ = trained()
    save_delta(tmp_path / "d.safetensors", toy_net(), remove_plan(net))
    assert metadata(tmp_path / "d.safetensors")["plan"] == ""
    assert same(apply_delta(toy_net(), tmp_path / "d.safetensors"), net)


def test_damaged_and_foreign_files_are_errors(tmp_path):
    path = tmp_path / "d.safetensors"
    save_delta(path, toy_net(), trained()[0])
    good = path.read_bytes()
    for content, message in (
        (good[:-1], "truncated"),
        (good[:100], "truncated"),
        (b"", "truncated"),
        (good[:-1] + bytes([good[-1] ^ 1]), "damaged, its values"),
    ):
        path.write_bytes(content)
        net = toy_net()
        with pytest.raises(ValueError, match=rf"d\.safetensors: .*{message}"):
            apply_delta(net, path)
        assert same(net, toy_net())
    save_file(toy_net().state_dict(), path)
    with pytest.raises(ValueError, match=r"wanted a file of format 'trady_triton.delta', got None"):
        apply_delta(toy_net(), path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        apply_delta(toy_net(), tmp_path / "none")


def test_channels_last_weights_of_which_every_channel_changed(tmp_path):
    base = toy_net().to(memory_format=torch.channels_last)
    net = copy.deepcopy(base)
    with torch.no_grad():
        net.stem.weight.add_(1.0)
    assert not net.stem.weight.is_contiguous()
    save_delta(tmp_path / "d.safetensors", base, net)
    assert same(apply_delta(base, tmp_path / "d.safetensors"), net)
