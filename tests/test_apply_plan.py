"""apply_plan and remove_plan: what changes in a model, what does not, what is kept for the backward."""

import copy
import io
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, RmsNorm
from torch import nn
from torch.nn.utils import prune
from toys import ToyNet, toy_batches, toy_net, toy_plan

from trady_triton import Policy, TraDyOptimizer, apply_plan, make_plan, rank_layers, remove_plan
from trady_triton.cost import CostModel, measure_call
from trady_triton.nn import LeanConv2d, LeanLinear
from trady_triton.slot import find_slot


def install(net, plan, channels):
    """Put channels into the slots by hand."""
    for name in plan.pool:
        find_slot(net.get_submodule(name).weight).set(channels[name])


def kept_bytes(run, excluded) -> list[int]:
    """Bytes of every storage kept for the backward while `run` runs, but for the excluded tensors."""
    excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sorted(size for pointer, size in storages.items() if pointer not in excluded)


def test_forward_values_and_state_dict_do_not_change():
    net = toy_net()
    x = toy_batches()[0][0]
    # Frozen, because torch itself folds the batch of a Linear otherwise where its weight requires a gradient.
    expected, keys = copy.deepcopy(net).requires_grad_(False)(x), list(net.state_dict())
    parameters = dict(net.named_parameters())
    plan = toy_plan(net)
    assert apply_plan(net, plan) is net
    install(net, plan, plan.sample(0))
    # Not bit for bit: torch folds the batch into a product of strided tokens only where a gradient is wanted.
    torch.testing.assert_close(net(x), expected, rtol=1e-13, atol=1e-13)
    assert list(net.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    net.load_state_dict(toy_net(seed=1).state_dict(), strict=True)
    assert torch.equal(net(x), toy_net(seed=1).requires_grad_(False)(x))


def test_remove_plan_restores_classes_and_flags():
    net = toy_net()
    net.norm.weight.requires_grad_(False)
    before = {name: (type(module), set(module.__dict__)) for name, module in net.named_modules()}
    flags = [parameter.requires_grad for parameter in net.parameters()]
    remove_plan(apply_plan(net, toy_plan(net)))
    assert {name: (type(module), set(module.__dict__)) for name, module in net.named_modules()} == before
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert all(find_slot(parameter) is None for parameter in net.parameters())
    apply_plan(net, toy_plan(toy_net()))  # and it can be planned again


def test_only_the_head_is_trained_unless_more_is_asked_for():
    def trained(**options):
        net = toy_net()
        apply_plan(net, toy_plan(net, **options))
        return {name for name, parameter in net.named_parameters() if parameter.requires_grad}

    head = {"head.weight", "head.bias"}
    biases = {"depthwise.bias", "grouped.bias", "pointwise.bias", "tokens.bias"}
    assert trained() == head
    assert trained(train_bias=True) == head | biases
    assert trained(train_norm=True) == head | {"norm.weight", "norm.bias"}


def test_trained_biases_and_norms_get_the_gradients_of_dense_autograd():
    net, dense = toy_net(), toy_net()
    x, y = toy_batches()[0]
    apply_plan(net, toy_plan(net, train_bias=True, train_norm=True))
    for model in (net, dense):
        F.cross_entropy(model(x), y).backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, dense.get_parameter(name).grad)


def test_train_eval_hooks_and_attributes_survive():
    net = toy_net().train()
    net.depthwise.eval()
    net.stem.note = "mine"
    calls = []
    net.stem.register_forward_hook(lambda *_: calls.append(1))
    apply_plan(net, toy_plan(net))
    assert net.training
    assert not net.depthwise.training
    assert net.stem.note == "mine"
    calls.clear()
    net(toy_batches()[0][0])
    assert calls == [1]


def test_a_copy_computes_the_same_and_trains_nothing():
    net = toy_net()
    plan = toy_plan(net)
    apply_plan(net, plan)
    install(net, plan, plan.sample(0))
    x = toy_batches()[0][0]
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    twin(x).sum().backward()
    assert all(find_slot(net.get_submodule(name).weight).proxy.grad is None for name in plan.pool)
    with pytest.raises(ValueError, match="deepcopy"):
        TraDyOptimizer(twin.parameters(), plan)
    apply_plan(remove_plan(twin), plan)
    TraDyOptimizer(twin.parameters(), plan)


def test_a_pickled_model_loads_and_computes_the_same():
    net = toy_net()
    plan = toy_plan(net)
    apply_plan(net, plan)
    install(net, plan, plan.sample(0))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    x = toy_batches()[0][0]
    assert torch.equal(torch.load(file, weights_only=False)(x), net(x))


def test_tied_weights_stay_tied_and_share_a_slot():
    class Tied(ToyNet):
        def __init__(self):
            super().__init__()
            self.again = nn.Conv2d(12, 10, 1)
            self.again.weight = self.pointwise.weight

        def forward(self, x):
            x = self.grouped(self.depthwise(self.stem(x)))
            return self.head(self.tokens(self.pointwise(x).mean((2, 3)) + self.again(x).mean((2, 3))))

    torch.manual_seed(0)
    net = Tied().double()
    dense = copy.deepcopy(net)
    x, y = toy_batches()[0]
    plan = make_plan(rank_layers(net, [(x, y)], F.cross_entropy), budget=1200, coverage=1.0)
    apply_plan(net, plan)
    assert net.again.weight is net.pointwise.weight
    assert net.again.slot is net.pointwise.slot
    install(net, plan, dict.fromkeys(plan.pool, (0, 2)))
    for model in (net, dense):
        F.cross_entropy(model(x), y).backward()
    expected = dense.pointwise.weight.grad.transpose(0, 1)[[0, 2]]
    torch.testing.assert_close(net.pointwise.slot.proxy.grad, expected)


def test_a_weight_that_is_shared_with_the_head_is_trained_whole():
    class AutoEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.inner, self.decode = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(F.gelu(self.inner(self.encode(x))))

    torch.manual_seed(0)
    net, x = AutoEncoder().double(), torch.randn(4, 6, dtype=torch.float64)
    dense = copy.deepcopy(net)
    ranking = rank_layers(net, [(x, x)], F.mse_loss)
    assert (ranking.head, [layer.name for layer in ranking.layers]) == (("decode",), ["inner"])
    plan = make_plan(ranking, budget=20)
    apply_plan(net, plan)
    install(net, plan, {"inner": (0, 2)})
    for model in (net, dense):
        F.mse_loss(model(x), x).backward()
    torch.testing.assert_close(net.encode.weight.grad, dense.encode.weight.grad)
    torch.testing.assert_close(net.inner.slot.proxy.grad, dense.inner.weight.grad.T[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_and_channels_last_survive(dtype):
    net = toy_net().to(memory_format=torch.channels_last).to(dtype)
    x = toy_batches()[0][0].to(dtype).to(memory_format=torch.channels_last)
    expected = net(x)
    plan = toy_plan(net)
    apply_plan(net, plan)
    install(net, plan, plan.sample(0))
    y = net(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert net.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert net.stem.slot.proxy.grad is None or net.stem.slot.proxy.grad.dtype == dtype


def test_a_model_moved_to_another_dtype_after_the_draw_is_an_error_until_resampled():
    net = toy_net()
    plan = toy_plan(net)
    apply_plan(net, plan)
    optimizer = TraDyOptimizer(net.parameters(), plan, lr=0.1)
    optimizer.resample(0)
    net.float()
    with pytest.raises(RuntimeError, match=r"resample\(epoch\)"):
        net(toy_batches(dtype=torch.float32)[0][0])
    optimizer.resample(0)
    net(toy_batches(dtype=torch.float32)[0][0]).sum().backward()
    optimizer.step()


LAYERS = {
    "conv": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 9)),
    "pointwise": (nn.Conv2d(6, 8, 1), (2, 6, 9, 9)),
    "strided pointwise": (nn.Conv2d(6, 8, 1, stride=2), (2, 6, 9, 9)),
    "depthwise": (nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6), (2, 6, 9, 9)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 9, 9)),
    "same": (Conv2dSame(6, 8, 3, stride=2), (2, 6, 10, 10)),
    "linear": (nn.Linear(6, 8), (2, 6)),
    "tokens": (nn.Linear(6, 8), (2, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_bytes_kept_are_what_the_cost_says_to_the_byte(name, count):
    layer, size = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1]
    net = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(size, requires_grad=True)
    net(x)
    plan = make_plan(rank_layers(net, [(x.detach(), None)], lambda y, _: y.sum()), budget="1MiB", batch_size=2)
    shape = plan.shapes["0"]
    assert shape == measure_call(LAYERS[name][0], x, LAYERS[name][0](x), 2)
    apply_plan(net, plan)
    install(net, plan, {"0": range(count)})
    # The input requires a gradient, so the layer saves its weight too: by reference, which costs nothing.
    kept = kept_bytes(lambda: net[0](x), net.parameters())
    assert sum(kept) == count * CostModel(2, 4, 4, unit="bytes").activation_cost(shape)
    net[0](x).sum().backward()
    grad = net[0].slot.proxy.grad
    assert (0 if grad is None else grad.nbytes) == count * plan.cost.gradient_cost(shape)


def test_nothing_is_computed_below_the_first_active_layer():
    net = toy_net()
    plan = toy_plan(net)
    apply_plan(net, plan)
    install(net, plan, {name: (0,) if name == "tokens" else () for name in plan.pool})
    reached = {}
    for name in plan.pool:
        module = net.get_submodule(name)
        module.register_forward_hook(lambda _, args, y, name=name: reached.update({name: y.requires_grad}))
    net(toy_batches()[0][0])
    assert reached == {"stem": False, "depthwise": False, "grouped": False, "pointwise": False, "tokens": True}


def test_layers_of_a_plan_for_another_model_are_named_and_nothing_changes():
    plan = toy_plan(toy_net())
    wider = toy_net()
    wider.tokens = nn.Linear(11, 9)
    other = nn.Sequential(nn.Linear(3, 3))
    subclassed = toy_net()
    subclassed.stem = type("OwnConv", (nn.Conv2d,), {})(3, 8, 3)
    headless = toy_net()
    del headless.head
    for net, message in (
        (wider, "'tokens'.*11.*10.*rank this model"),
        (other, "'stem'.*no module"),
        (subclassed, "'stem'.*OwnConv"),
        (headless, "head 'head'"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_plan(net, plan)
        assert not any(isinstance(module, LeanConv2d | LeanLinear) for module in net.modules())
        assert all(parameter.requires_grad for parameter in net.parameters())
    with pytest.raises(ValueError, match="no plan"):
        remove_plan(other)
    net = apply_plan(toy_net(), plan)
    with pytest.raises(ValueError, match="remove_plan"):
        apply_plan(net, plan)


def test_what_is_no_model_or_no_plan_is_told():
    net = toy_net()
    plan = toy_plan(net)
    for model, own, message in ((plan, net, "model of type Plan"), (net, None, "plan of type NoneType: wanted a Plan")):
        with pytest.raises(TypeError, match=message):
            apply_plan(model, own)
    with pytest.raises(ValueError, match=r"give the model itself, which this one wraps as \.module"):
        apply_plan(nn.DataParallel(net), plan)


def test_subclasses_with_another_forward_are_neither_ranked_nor_swapped():
    net = timm.create_model("nf_resnet26", num_classes=4).eval()
    batch = (torch.randn(1, 3, 64, 64), torch.tensor([1]))
    expected = net(batch[0])
    ranked = rank_layers(
        timm.create_model("resnet10t", num_classes=4), [(torch.randn(1, 3, 64, 64), torch.tensor([1]))], F.cross_entropy
    )
    assert ranked.layers
    with pytest.raises(ValueError, match=r"no layer to rank: .* has .* ScaledStdConv2d"):
        rank_layers(net, [batch], F.cross_entropy)
    assert torch.equal(net(batch[0]), expected)


MADE = {  # weights that a hook makes at every call
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_a_weight_that_is_made_of_others_is_neither_ranked_nor_trained(make):
    net = nn.Sequential(nn.Linear(8, 8), make(nn.Linear(8, 8)), nn.Linear(8, 2))
    x = torch.randn(3, 8)
    plan = make_plan(rank_layers(net, [(x, None)], lambda y, _: y.sum()), budget="1MiB")
    assert plan.pool == ("0",)
    before, expected = {name: p.clone() for name, p in net.named_parameters()}, net.eval()(x)
    optimizer = TraDyOptimizer(apply_plan(net, plan).parameters(), plan, lr=0.1)
    optimizer.resample(0)
    y = net(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    optimizer.step()
    moved = {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"0.weight", "2.weight", "2.bias"}


def test_remove_plan_passes_over_what_was_taken_out():
    net = toy_net()
    apply_plan(net, toy_plan(net))
    net.head = nn.Identity()
    remove_plan(net)
    assert type(net.stem) is nn.Conv2d
    assert not hasattr(net, "trady")


@pytest.mark.parametrize("name", ["conv", "linear"])
def test_inputs_without_a_batch_are_taken_as_torch_takes_them(name):
    layer, size = copy.deepcopy(LAYERS[name])
    net = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2)).double()
    x = torch.randn(size, dtype=torch.float64)
    net(x)
    apply_plan(net, make_plan(rank_layers(net, [(x, None)], lambda y, _: y.sum()), budget="1MiB", train_bias=True))
    install(net, net.trady.plan, {"0": range(3)})
    single = x[0].clone().requires_grad_()
    expected = copy.deepcopy(LAYERS[name][0]).double()(single)
    y = net[0](single)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert single.grad.shape == single.shape
    assert net[0].bias.grad.shape == net[0].bias.shape


@pytest.mark.parametrize(
    ("options", "norms"),
    [
        ({"policy": Policy(batch_norm="affine")}, {"1.weight", "1.bias"}),
        ({"train_norm": True}, {"1.weight", "1.bias", "2.weight", "2.bias", "4.weight"}),
    ],
)
def test_batchnorms_affine_is_trained_alone_or_with_that_of_every_norm(options, norms):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), RmsNorm(2), nn.Flatten(),
        nn.Linear(16, 2),
    )  # fmt: skip
    ranking = rank_layers(net.eval(), [(torch.randn(2, 3, 2, 2), torch.arange(2))], F.cross_entropy)
    apply_plan(net, make_plan(ranking, budget=200, **options))
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained == norms | {"6.weight", "6.bias"}


def step_of(net, optimizer):
    x, y = toy_batches()[0]
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()


def test_another_optimizer_on_a_planned_model_is_told_of():
    net = toy_net()
    plan = toy_plan(net)
    apply_plan(net, plan)
    with pytest.warns(UserWarning, match="only what is trained whole, the head, has gradients") as told:
        step_of(net, torch.optim.SGD(net.parameters()))
    assert {warning.filename for warning in told} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            net(toy_batches()[0][0])
        optimizer = TraDyOptimizer(net.parameters(), plan)
        optimizer.resample(0)
        step_of(net, optimizer)
        find_slot(net.stem.weight).set(())  # a draw may be empty
        step_of(net, optimizer)
        remove_plan(net)
        step_of(net, torch.optim.SGD(net.parameters()))


@pytest.mark.parametrize("sampler", ["head", "bias"])
def test_a_plan_without_channels_needs_no_draw(sampler):
    net = toy_net()
    apply_plan(net, toy_plan(net, None, sampler=sampler))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_of(net, torch.optim.SGD([p for p in net.parameters() if p.requires_grad]))
