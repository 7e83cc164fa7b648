"""Blocks and attention that run twice: exact gradients, and their inputs alone kept."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from kept import kept_bytes
from nets import fake_net, plan_at, random_net
from test_exact_nets import assert_same
from torch import Tensor, nn

from trady_triton import TraDyOptimizer, apply_plan, choose_recompute, make_plan, rank_layers, remove_plan
from trady_triton.meters import KeptBytes, peak_memory
from trady_triton.nn import LeanSequential, blocks
from trady_triton.nn.attention import attention_modules
from trady_triton.nn.recompute import recomputed
from trady_triton.policy import Policy

SMALL = {
    "efficientnet_b0": (32, {}),
    "mobilenetv3_small_100": (32, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 4}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "depths": (1, 2, 1)}),
    "convnext_atto": (32, {}),
    "regnety_002": (32, {}),
    "densenet121": (32, {}),
}
RUNS = {  # neighbours in a Sequential, and in a RegNet over the end of a stage
    "efficientnet_b0": ("blocks.1:3", "blocks.4.0:3", "blocks.6"),
    "mobilenetv3_small_100": ("blocks.0:6",),
    "regnety_002": ("1:3", "4:9"),
    "vit_tiny_patch16_224": ("blocks.0:2", "blocks.2:4"),
    "convnext_atto": ("stages.1:4",),
}
EXACT = {
    "lean": {},
    "attention": {"attention": "recompute"},
    "blocks": {"recompute": True},
    "parts": {"recompute": True, "recompute_parts": 2},
    "runs": {"recompute": False},
    "runs in parts": {"recompute": False, "recompute_parts": 2},
}
CASES = [
    (name, policy)
    for name in SMALL
    for policy in EXACT
    if (policy != "attention" or name.startswith(("vit", "swin"))) and ("runs" not in policy or name in RUNS)
]


class Two(nn.Module):
    """A block with a random layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.drop(self.inner(x).sin()) * scale


def gradients(model: nn.Module, x: Tensor, layers: dict[str, range], head: str) -> tuple[Tensor, ...]:
    """(y, dX, dW[:, channels] of each layer, dW of the head); plain or planned."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.square().sum().backward()
    compact = []
    for name, channels in layers.items():
        layer = model.get_submodule(name)
        slot = getattr(layer, "slot", None)
        compact.append(layer.weight.grad.transpose(0, 1)[channels] if slot is None else slot.proxy.grad)
    return y.detach(), leaf.grad, *compact, model.get_submodule(head).weight.grad


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_exact_policies_have_the_gradients_of_the_plain_net(name, policy):
    size, options = SMALL[name]
    plain = random_net(name, **options)
    model, x = copy.deepcopy(plain), torch.randn(2, 3, size, size, dtype=torch.float64)
    plan = plan_at(model, x, (0.0, 0.4, 0.9))
    units = {True: blocks(model), False: RUNS.get(name), None: ()}[EXACT[policy].get("recompute")]
    apply_plan(model, replace(plan, policy=Policy(**{**EXACT[policy], "recompute": units})))
    drawn = {layer: range(0, plan.shapes[layer].in_channels, 2) for layer in plan.pool}
    for layer, channels in drawn.items():
        model.get_submodule(layer).slot.set(channels)
    lean, dense = (gradients(net, x, drawn, plan.head[0]) for net in (model, plain))
    if "parts" in policy:
        assert_same(lean[0], dense[0])  # products of other sizes
    else:
        assert torch.equal(lean[0], dense[0])
    for ours, theirs in zip(lean[1:], dense[1:], strict=True):
        assert_same(ours, theirs)


def test_a_recomputed_module_keeps_its_input_alone():
    module, x = recomputed_copy(Two()), torch.randn(3, 4, requires_grad=True) * 1
    assert kept_bytes(lambda: module(x), module)[1] == x.numel() * 4


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_a_recomputed_module_keeps_nothing_where_nothing_is_trained(context):
    module = recomputed_copy(Two().requires_grad_(False))
    with context():
        assert kept_bytes(lambda: module(torch.randn(3, 4)), module)[1] == 0


def test_the_second_run_draws_the_same_dropout():
    plain = Two()
    module, x = recomputed_copy(plain), torch.randn(3, 4)
    grads = []
    for net in (module, plain):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        net(leaf, scale=2.0).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_and_pickles_of_a_recomputed_module_work(duplicate):
    module, x = recomputed_copy(Two()).eval(), torch.randn(3, 4)
    twin = duplicate(module)
    assert type(twin) is type(module)
    assert torch.equal(twin(x), module(x))


def test_remove_plan_undoes_recomputation():
    model = random_net("efficientnet_b0")
    classes = [type(module) for module in model.modules()]
    plan = plan_at(model, torch.zeros(1, 3, 32, 32, dtype=torch.float64), (0.5,))
    remove_plan(apply_plan(model, replace(plan, policy=Policy(recompute=blocks(model), activations=8))))
    assert [type(module) for module in model.modules()] == classes
    assert not any("policy" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (("blocks.99",), r"recompute 'blocks\.99': the model has no module of that name"),
        (("nowhere.0:2",), r"recompute 'nowhere\.0:2': the model has no module of that name"),
        (("blocks.0.0.conv_dw.0:2",), "the model has no module of that name"),
        (("blocks.0:8",), r"recompute 'blocks\.0:8': wanted 'i:j' with 0 <= i < j <= 7"),
        (("blocks.3:3",), "wanted 'i:j'"),
        (("blocks.-1:3",), "wanted 'i:j'"),
        (("blocks.0:3", "blocks.2:4"), "runs of 'blocks' overlap at its link 2"),
    ],
)
def test_an_unknown_unit_is_refused(units, message):
    model = random_net("efficientnet_b0")
    plan = plan_at(model, torch.zeros(1, 3, 32, 32, dtype=torch.float64), (0.5,))
    with pytest.raises(ValueError, match=message):
        apply_plan(model, replace(plan, policy=Policy(recompute=units)))
    assert not hasattr(model, "trady")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_and_pickles_of_a_chain_keep_its_runs(duplicate):
    chain = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU())
    chain.__class__, chain.runs = LeanSequential, ((0, 2), (2, 4))
    twin, x = duplicate(chain), torch.randn(3, 4, requires_grad=True) * 1
    assert kept_bytes(lambda: twin(x), twin)[1] == 2 * x.numel() * 4
    assert torch.equal(twin(x), chain(x))
    assert len(chain[1:]) == 3
    assert chain[1:].runs == ()


BARS = {  # full fine-tuning over what the chosen exact policy keeps, batch 8, 224 px, the layer at 25 % depth trained
    "ghostnet_100": 100,
    "regnety_008": 100,
    "efficientnet_b0": 100,
    "mobilenetv3_large_100": 100,
    "swin_tiny_patch4_window7_224": 30,
    "convnext_tiny": 30,
    "vit_tiny_patch16_224": 20,
    "poolformer_s12": 41,  # as timm's checkpointing keeps
}


@pytest.mark.parametrize(("name", "bar"), BARS.items())
def test_chosen_exact_policy_keeps_few_bytes(name, bar):
    model = random_net(name, torch.float32)
    shape = (8, 3, 224, 224)
    with fake_net(model) as fake:
        x = torch.empty(shape)
        full = kept_bytes(partial(fake, x), fake)[1]
        plan = plan_at(fake, x, (0.25,))
    plan = choose_recompute(replace(plan, budget=2 * plan.cost.channel_cost(plan.shapes[plan.pool[0]])), model, shape)
    with fake_net(model) as fake:
        apply_plan(fake, plan)
        fake.get_submodule(plan.pool[0]).slot.set((0, 1))
        lean = kept_bytes(partial(fake, torch.empty(shape)), fake)[1]
    assert plan.policy.is_exact
    assert full >= bar * lean, f"{full / 1e6:.1f} MB / {lean / 1e6:.2f} MB = {full / lean:.1f}"


def test_parts_keep_the_same_bytes_and_need_less_at_once():
    plain = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)).requires_grad_(False)
    module, x = recomputed_copy(plain), torch.randn(16, 8)
    kept, peaks = [], []
    for parts in (1, 2, 4):
        module.policy = Policy(recompute_parts=parts)
        start = x.clone().requires_grad_() * 1
        y, size = kept_bytes(partial(module, start), module)
        kept.append(size)
        with peak_memory() as memory:
            y.sum().backward()
        peaks.append(memory.peak_bytes)
    assert kept == [x.numel() * 4] * 3
    assert peaks[0] > peaks[1] > peaks[2]


def test_a_batch_is_not_parted_where_another_argument_is_of_the_batch_too():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            seen.append((len(x), len(y)))
            return super().forward(x + y)

    module = recomputed_copy(Spy(3, 3))
    module.policy = Policy(recompute_parts=2)
    module(torch.randn(4, 3), torch.randn(4, 3))
    module(torch.randn(4, 3), torch.randn(3))
    assert seen[:3] == [(4, 4), (2, 3), (2, 3)]


def test_parts_of_a_tuple_are_refused():
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, super().forward(x)

    module = recomputed_copy(Pair(3, 3))
    module.policy = Policy(recompute_parts=2)
    with pytest.raises(TypeError, match=r"recompute_parts 2: .*Pair returns tuple, wanted a tensor"):
        module(torch.randn(4, 3))


@pytest.mark.parametrize("name", ["past_key_values", None])
def test_a_cache_is_refused_by_name(name):
    class Cache:
        def update(self, x: Tensor) -> Tensor:
            return x

    class Cached(nn.Linear):
        def forward(self, x: Tensor, past_key_values: Cache) -> Tensor:
            return super().forward(past_key_values.update(x))

    module, x = recomputed_copy(Cached(3, 3)), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"Cached is recomputed but is given a Cache, .*use_cache = False"):
        module(x, **{name: Cache()}) if name else module(x, Cache())
    with torch.no_grad():
        module(x, Cache())


ATTENTION = {  # how many, and the options of a small net
    "vit_tiny_patch16_224": (2, {"depth": 2}),
    "cait_xxs24_224": (3, {"depth": 1}),
    "xcit_nano_12_p16_224": (3, {"depth": 1}),
    "maxvit_pico_rw_256": (22, {}),
    "davit_tiny": (8, {"depths": (1, 1, 1, 1)}),
    "efficientvit_b0": (4, {}),
    "resnet18": (0, {}),
}


@pytest.mark.parametrize(("name", "count", "options"), [(name, *case) for name, case in ATTENTION.items()])
def test_attention_is_found_whoever_wrote_it(name, count, options):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    found = attention_modules(model)
    assert len(found) == count
    assert all(any(isinstance(m, nn.Linear | nn.Conv2d) for m in model.get_submodule(n).modules()) for n in found)


def test_no_attention_is_seen_in_a_name_that_happens_to_spell_one():
    class LayerNormLayer(Two):
        pass

    class AttentionNet(nn.Sequential):
        pass

    assert attention_modules(AttentionNet(LayerNormLayer())) == set()


def test_attention_with_batch_norm_on_batch_statistics_is_not_run_twice():
    class Attention(nn.Sequential):
        pass

    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(Attention(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(256, 2))
    plan = plan_at(model, x, (0.0,))
    with pytest.raises(ValueError, match=r"running statistics of '0\.1' again"):
        apply_plan(model, replace(plan, policy=Policy(batch_norm="train", attention="recompute")))
    assert type(model[0][0]) is nn.Conv2d
    apply_plan(model, replace(plan, policy=Policy(attention="recompute")))


def test_a_policy_recomputes_attention_of_any_type():
    net = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    x = torch.randn(2, 5, 8)
    ranking = rank_layers(net, [(x, None)], lambda y, _: y.square().sum())
    plan = make_plan(ranking, budget="1MiB", layers=["0"])
    kept = {}
    for attention in ("keep", "recompute"):
        model = apply_plan(copy.deepcopy(net).eval(), replace(plan, policy=Policy(attention=attention)))
        model[0].slot.set(range(8))
        with KeptBytes(model) as books:
            y = model(x)
        kept[attention] = books.by_layer["1.self_attn"]
        del y
    assert kept["recompute"] == x.numel() * 4 < kept["keep"]
    model = apply_plan(net, replace(plan, policy=Policy(attention="recompute", recompute=("1",))))
    model[0].slot.set(range(8))
    model(x).sum().backward()  # one recomputed inside the other, and given one tensor thrice


def recomputed_copy(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    twin.__class__ = recomputed(type(module))
    return twin


def test_two_epochs_under_recomputation_train_as_without():
    x, steps = torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    for units in ((), None):
        model = random_net("efficientnet_b0")
        plan = plan_at(model, x, (0.1, 0.5))
        chosen = Policy(recompute=blocks(model) if units is None else units)
        plan = replace(plan, budget=20 * max(plan.cost.channel_cost(plan.shapes[n]) for n in plan.pool), policy=chosen)
        apply_plan(model, plan)
        optimizer = TraDyOptimizer(model.parameters(), plan, lr=0.01)
        for epoch in range(2):
            optimizer.resample(epoch)
            for _ in range(2):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
        steps.append([model.get_submodule(name).weight.detach() for name in plan.pool])
    for lean, recomputed_ in zip(*steps, strict=True):
        assert_same(recomputed_, lean)


class OwnNorm(nn.BatchNorm2d):
    """A BatchNorm that nobody taught, so that it uses the batch's own statistics under any policy."""


@pytest.mark.parametrize("unit", ["1", "1.0:2"])
def test_an_untaught_batch_norm_is_not_run_twice_and_its_batch_not_parted(unit):
    blocks = (nn.Sequential(nn.Conv2d(8, 32, 1), OwnNorm(32), nn.GELU(), nn.Conv2d(32, 8, 1)) for _ in range(4))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.Flatten(), nn.Linear(128, 2)).eval()
    plan = plan_at(model, torch.randn(2, 3, 4, 4), (0.0,))
    with pytest.raises(ValueError, match=r"statistics of '1\.1' again; wanted .* a type that was taught"):
        apply_plan(model, replace(plan, policy=Policy(recompute=(unit,))))
    assert not hasattr(model, "trady")
    policy = choose_recompute(plan, model, (1024, 3, 4, 4)).policy
    chosen = apply_plan(model, replace(plan, policy=policy))
    chosen.train()(torch.randn(8, 3, 4, 4)).sum().backward()
    assert [norm.num_batches_tracked.item() for norm in model.modules() if isinstance(norm, OwnNorm)] == [1] * 4
    assert policy.recompute_parts == 1


class Shared(nn.Module):
    """A block that is called alone, and by another one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        self.outer = nn.Sequential(nn.GELU(), nn.Linear(32, 32), nn.GELU(), self.block)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        for _ in range(2):
            x = self.outer(x)
        return self.head(x.mean(1))


def test_no_unit_that_is_chosen_runs_within_another():
    model, shape = Shared(), (4, 64, 32)
    ranking = rank_layers(model, [(torch.randn(shape), torch.zeros(4, dtype=torch.long))], nn.functional.cross_entropy)
    plan = make_plan(ranking, budget="16KiB", batch_size=4, coverage=1.0)
    chosen = [model.get_submodule(name) for name in choose_recompute(plan, model, shape).policy.recompute]
    assert chosen
    assert not any(inner is not outer and inner in outer.modules() for inner in chosen for outer in chosen)
