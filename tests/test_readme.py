"""The README's code runs as it stands."""

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist

from trady_triton import TraDyOptimizer, apply_plan, make_plan, rank_layers
from trady_triton.nn import LeanConv2d

README = (Path(__file__).parent.parent / "README.md").read_text()
FIRST, *RECIPES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TITLES = re.findall(r"^\*\*([^*]+?)\.?\*\*[^`]", README.partition("## In your own loop")[2], re.MULTILINE)[
    : len(RECIPES)
]


def test_the_code_of_the_readme_trains_a_network(monkeypatch):
    create_model = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: create_model(name, **{**options, "pretrained": False})
    )
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 9]))]
    names = {"batches": batches, "loader": batches}
    exec(FIRST.replace("range(20)", "range(2)"), names)
    assert names["optimizer"].epoch == 1
    assert isinstance(names["model"].conv_head, LeanConv2d)


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the first block of the README leaves behind, and what the recipes take as given; in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", num_classes=3)
    model, loss_fn = copy.deepcopy(base), torch.nn.CrossEntropyLoss()
    loader = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 2])) for _ in range(5)]
    plan = make_plan(rank_layers(model, loader[:1], loss_fn), budget="256KiB", batch_size=2)
    apply_plan(model, plan)
    optimizer = TraDyOptimizer(model.parameters(), plan, lr=0.05)
    return {"torch": torch, "device": "cpu", "TraDyOptimizer": TraDyOptimizer, "apply_plan": apply_plan,
            "make_plan": make_plan, "rank_layers": rank_layers, "base": base, "model": model, "plan": plan,
            "loss_fn": loss_fn, "loader": loader, "optimizer": optimizer,
            "before": copy.deepcopy(model.state_dict())}  # fmt: skip


def run(title, names):
    """Run a recipe for two epochs."""
    (code,) = (recipe for name, recipe in zip(TITLES, RECIPES, strict=True) if name.startswith(title))
    exec(code.replace("range(20)", "range(2)").replace("epochs=20", "epochs=2"), names)
    return names


def moved(model, before):
    """Names of the weights that were trained."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def check_trained(names, epoch=1):
    assert names["optimizer"].epoch == epoch
    changed = moved(names["model"], names["before"])
    assert {"fc.weight", "fc.bias"} < changed <= {"fc.weight", "fc.bias", *(f"{n}.weight" for n in names["plan"].pool)}


def test_every_recipe_has_a_test():
    here = Path(__file__).read_text()
    assert len(RECIPES) == 9
    assert all(f'run("{title[:5]}' in here for title in TITLES)


def test_mixed_precision_accumulation_and_clipping(names):
    steps = []
    names["optimizer"].register_step_post_hook(lambda *_: steps.append(1))
    check_trained(run("Mixed precision", names))
    assert len(steps) == 4  # 5 batches are two windows


def test_compile(names, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # others take half a minute
    check_trained(run("torch.compile", names))


@pytest.mark.filterwarnings("error:gradients of the parameters")
def test_several_processes(names, monkeypatch):
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(variable, value)
    init = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda: init("gloo"))
    try:
        check_trained(run("Several processes", names))
    finally:
        dist.destroy_process_group()


def test_timm(names):
    check_trained(run("timm", names))
    assert names["optimizer"].param_groups[0]["lr"] < 0.05


def test_transformers(names, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra hf)")
    from integrations.bert import bert, collate, sentences
    from transformers import Trainer, TrainingArguments

    net = bert()
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    names |= {"bert": net, "batches": [collate(sentences(8))], "data": sentences(), "args": args, "Trainer": Trainer}
    before = copy.deepcopy(net.state_dict())
    assert run("Transformers", names)["optimizer"].epoch == 1
    assert {"classifier.weight", "classifier.bias"} < moved(net, before)


@pytest.mark.filterwarnings("ignore")  # of few workers and missing loggers
def test_lightning(names):
    pytest.importorskip("lightning", reason="lightning is not installed (extra lightning)")
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = names["model"]

        def training_step(self, batch, index):
            return names["loss_fn"](self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return names["optimizer"]

    def quiet(**options):
        return Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **options
        )

    loader = torch.utils.data.DataLoader(names["loader"], batch_size=None)
    check_trained(run("Lightning", {**names, "module": Module(), "Trainer": quiet, "loader": loader}))


def test_accelerate(names):
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra hf)")
    from accelerate import Accelerator

    loader = torch.utils.data.DataLoader(names["loader"], batch_size=None)
    inner = names["optimizer"]
    names = run("accelerate", {**names, "accelerator": Accelerator(cpu=True), "loader": loader})
    check_trained({**names, "optimizer": inner})


def test_resume(names):
    names["optimizer"].resample(3)
    state = names["optimizer"].state_dict()
    run("Resume", names)
    assert names["optimizer"].state_dict() == state
    assert names["optimizer"].epoch == 3


def test_a_delta(names, capsys):
    run("timm", names)
    assert moved(names["base"], names["model"].state_dict())
    run("A delta", names)
    assert not moved(names["base"], names["model"].state_dict())
    assert "of a full checkpoint" in capsys.readouterr().out
