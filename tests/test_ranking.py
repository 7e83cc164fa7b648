"""Ranking against dense autograd, and what it leaves behind."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import ToyNet, toy_batches, toy_net, toy_ranking

from trady_triton import Ranking, apply_plan, make_plan, rank_layers
from trady_triton.cost import CostModel


def dense_norms(net: nn.Module, batches) -> dict[str, torch.Tensor]:
    """Channel norms summed over the batches, channel by channel from dense gradients."""
    sums: dict[str, torch.Tensor] = {}
    for x, y in batches:
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for name, layer in net.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and name != "head":
                grad, groups = layer.weight.grad, getattr(layer, "groups", 1)
                out, group_size = grad.shape[0] // groups, grad.shape[1]
                norms = torch.stack(
                    [
                        grad[c // group_size * out : (c // group_size + 1) * out, c % group_size].norm()
                        for c in range(groups * group_size)
                    ]
                )
                sums[name] = sums.get(name, 0) + norms
    return sums


def test_norms_equal_dense_autograd_for_every_kind_of_layer():
    batches = toy_batches(3)
    expected = dense_norms(toy_net(), batches)
    ranking = rank_layers(toy_net(), batches, F.cross_entropy)
    assert ranking.steps == 3
    assert [layer.name for layer in ranking.layers] == list(expected)
    for layer in ranking.layers:
        torch.testing.assert_close(torch.tensor(layer.norms, dtype=torch.float64), expected[layer.name])


def test_layer_rgn_is_the_sum_of_norms_over_the_cost_of_one_channel():
    layer = toy_ranking(toy_net()).layers[0]
    assert layer.rgn(CostModel()) == pytest.approx(sum(layer.norms) / (8 * 9 + 144))


def test_model_buffers_gradients_flags_and_random_state_are_left_as_they_were():
    net = toy_net().train()
    net.depthwise.eval()
    net.stem.weight.requires_grad_(False)
    net.head.bias.grad = torch.ones(5, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    flags = [parameter.requires_grad for parameter in net.parameters()]
    random_state = torch.get_rng_state()
    rank_layers(net, toy_batches(2), F.cross_entropy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["head.bias"]
    assert torch.equal(torch.get_rng_state(), random_state)


def test_model_is_left_as_it_was_when_a_batch_fails():
    net = toy_net().train()
    with pytest.raises(RuntimeError):
        rank_layers(net, [*toy_batches(), (torch.zeros(1, 4, 12, 12), torch.zeros(1))], F.cross_entropy)
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not net.stem._forward_hooks
    assert not net.stem.weight._post_accumulate_grad_hooks


def test_the_seed_decides_what_a_drawing_loss_sees():
    def noisy(output, target):
        return F.cross_entropy(output + torch.randn_like(output), target)

    runs = [rank_layers(toy_net(), toy_batches(), noisy, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_no_two_dense_weight_gradients_live_at_once():
    net, alive, most = toy_net(), set(), []
    for parameter in net.parameters():

        def entered(grad, parameter=parameter):
            alive.add(parameter)
            most.append(sum(p.grad is not None for p in net.parameters()))
            return grad

        parameter.register_hook(entered)
    rank_layers(net, toy_batches(), F.cross_entropy)
    assert len(alive) == 6  # every Conv2d and Linear weight, nothing else
    assert max(most) == 0  # when a gradient arrives, no other is stored


def test_shared_weights_are_one_layer_whose_positions_add_up():
    class Twice(ToyNet):
        def __init__(self):
            super().__init__()
            self.again = nn.Conv2d(12, 10, 1)
            self.again.weight = self.pointwise.weight

        def forward(self, x):
            x = self.grouped(self.depthwise(self.stem(x)))
            x = self.pointwise(x).mean((2, 3)) + self.again(x).mean((2, 3))
            return self.head(self.tokens(x))

    ranking = toy_ranking(Twice().double())
    names = [layer.name for layer in ranking.layers]
    assert "again" not in names
    assert ranking.layers[names.index("pointwise")].shape.out_positions == 9 + 36


def test_a_weight_that_an_untaught_module_uses_is_not_ranked():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner, self.decode = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
            self.decode.weight = self.embed.weight

        def forward(self, tokens):
            return self.decode(self.inner(self.embed(tokens)).mean(1))

    batches = [(torch.randint(0, 7, (2, 5)), torch.tensor([0, 3]))]
    ranking = rank_layers(Tied(), batches, F.cross_entropy, head=())
    assert [layer.name for layer in ranking.layers] == ["inner"]


def test_save_and_load_round_trip(tmp_path):
    ranking = toy_ranking(toy_net())
    ranking.save(tmp_path / "ranking.json")
    assert Ranking.load(tmp_path / "ranking.json") == ranking
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("content", ["", "[1]", '{"format": "trady_triton.plan", "version": 1}', b"\xff\xfe"])
def test_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "ranking.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="ranking"):
        Ranking.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers[0].pop("norms"),
        lambda layers: layers[0]["norms"].pop(),
        lambda layers: layers[0]["norms"].__setitem__(0, float("nan")),
        lambda layers: layers[0]["norms"].__setitem__(0, -1.0),
        lambda layers: layers[0]["norms"].__setitem__(0, "1"),
        lambda layers: layers[0].__setitem__("shape", None),
        lambda layers: layers.append(layers[0]),
        lambda layers: [layer.update(norms=[0.0] * len(layer["norms"])) for layer in layers],
    ],
    ids=["no norms", "a norm less", "nan", "negative", "text", "no shape", "twice", "all 0"],
)
def test_a_damaged_ranking_is_refused(tmp_path, change):
    path = tmp_path / "ranking.json"
    toy_ranking(toy_net()).save(path)
    content = json.loads(path.read_text())
    change(content["layers"])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged"):
        Ranking.load(path)


def test_a_layer_without_any_gradient_ranks_last(tmp_path):
    ranking = toy_ranking(toy_net())
    dead = replace(ranking.layers[0], norms=(0.0,) * len(ranking.layers[0].norms))
    Ranking((dead, *ranking.layers[1:]), ranking.head, 1).save(tmp_path / "ranking.json")
    assert Ranking.load(tmp_path / "ranking.json").order()[-1] == dead.name


def test_table_lists_every_layer_in_rank_order():
    ranking = toy_ranking(toy_net())
    lines = ranking.table().splitlines()[1:]
    assert [line.split()[1] for line in lines] == list(ranking.order())
    assert lines[-1].endswith("100.0%")


def test_user_mistakes_are_named():
    net = toy_net()
    with pytest.raises(ValueError, match="batches is empty"):
        rank_layers(net, [], F.cross_entropy)
    with pytest.raises(ValueError, match="'haed'"):
        rank_layers(net, toy_batches(), F.cross_entropy, head=["haed"])
    with pytest.raises(TypeError, match="str"):
        rank_layers(net, [("x", torch.zeros(1))], F.cross_entropy)
    with pytest.raises(TypeError, match="model of type str: wanted a Module"):
        rank_layers("resnet50", toy_batches(), F.cross_entropy)
    with pytest.raises(TypeError, match=r"head 'head': wanted a sequence of module names, such as \['head'\]"):
        rank_layers(net, toy_batches(), F.cross_entropy, head="head")
    x, y = toy_batches()[0]
    for batches, found in (((x, y), "Tensor"), ([(x,)], "tuple of length 1"), ([[x, y, y]], "list of length 3")):
        with pytest.raises(ValueError, match=f"a batch is a {found}: wanted an iterable of .input, target. pairs"):
            rank_layers(net, batches, F.cross_entropy)
    with pytest.raises(ValueError, match=r"loss_fn returned a tensor of shape \(\d+,\): wanted a scalar"):
        rank_layers(net, [(x, y)], lambda output, target: output[:, 0])
    with pytest.raises(ValueError, match="loss_fn returned a float"):
        rank_layers(net, [(x, y)], lambda output, target: 0.5)
    with pytest.raises(ValueError, match="without gradient"):
        rank_layers(net, [(x, y)], lambda output, target: output.sum().detach())
    with pytest.raises(ValueError, match="not finite"):
        rank_layers(net, toy_batches(), lambda output, target: output.sum() * float("nan"))
    with pytest.raises(ValueError, match=r"all gradient norms of \d layers are 0, wanted some above 0"):
        rank_layers(net, toy_batches(), lambda output, target: output.sum() * 0)
    apply_plan(net, make_plan(toy_ranking(net), budget=1200))
    with pytest.raises(ValueError, match="remove_plan"):
        rank_layers(net, toy_batches(), F.cross_entropy)


class TinyLM(nn.Module):
    """Two Linears between an embedding and an output layer that may share its weight."""

    def __init__(self, *, tied):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.out = nn.Linear(4, 9, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.down(self.up(self.embed(ids)).relu())).flatten(0, 1)


@pytest.mark.parametrize(("tied", "head"), [(True, ()), (False, ("out",))])
def test_an_output_layer_that_is_the_embedding_too_is_no_head(tied, head):
    net, ids = TinyLM(tied=tied), torch.arange(8).view(2, 4)
    ranking = rank_layers(net, [(ids, ids.flatten())], F.cross_entropy)
    assert ranking.head == head
    assert {layer.name for layer in ranking.layers} == {"up", "down"}


def test_a_model_without_layers_to_rank_says_what_it_has():
    net = nn.Sequential(nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"Sequential has no Conv2d or Linear .* it has 2 Conv1d, 1 BatchNorm1d"):
        rank_layers(net, toy_batches(), F.cross_entropy)
