"""The table of who may import whom; the rooms below stay free of the rooms above."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = {"torch", "einops"}
# Room -> what it may import besides the standard library and itself. `plan` calls `sampling`, so that
# `plan.sample(epoch)` exists and the samplers stay functions of plain numbers. `planner` is make_plan as users call it:
# it may promise memory, for which the ledger rehearses a step, so it stands above both.
ALLOWED = {
    "serial": set(),
    "arguments": set(),
    "cost": {"torch", "ops"},
    "sampling": {"torch", "cost"},
    "strategies": {"torch", "sampling"},
    "registry": {"torch"},
    "sharding": {"torch"},
    "slot": {"torch", "ops", "sharding"},
    "batch": {"torch"},
    "ranking": {"torch", "arguments", "batch", "cost", "registry", "serial"},
    "policy": set(),
    "pooling": {"cost", "ranking"},
    "budget": {"sampling", "strategies"},
    "savings": {"cost"},
    "plan": {"torch", "cost", "policy", "sampling", "savings", "serial", "strategies"},
    "budget_plan": {
        *("torch", "arguments", "budget", "cost", "plan", "policy", "pooling", "ranking", "sampling", "strategies"),
    },
    "ops": {"torch", "triton"},
    "functional": {"torch", "cost", "ops", "slot"},
    "nn": {*CORE, "arguments", "batch", "cost", "functional", "ops", "plan", "policy", "registry", "slot"},
    "delta": {*CORE, "arguments", "ranking", "safetensors", "serial"},
    "meters": {"torch"},
    "stats": {"torch"},
    "probes": {"torch", "sampling", "slot"},
    "optim": {"torch", "cost", "meters", "ops", "plan", "ranking", "sampling", "sharding", "slot"},
    "optimizer": {"torch", "optim", "plan", "sampling", "slot"},
    "microbatch": {"torch", "batch"},
    "rehearsal": {"torch", "batch", "microbatch", "nn", "optimizer", "plan", "slot"},
    "ledger": {"torch", "arguments", "batch", "meters", "plan", "rehearsal", "serial"},
    "promise": {"torch", "batch", "meters", "nn", "plan", "rehearsal", "slot"},
    "trace": {"torch", "batch", "meters", "microbatch"},
    "choose": {"torch", "arguments", "batch", "nn", "plan", "policy", "rehearsal", "trace"},
    "search": {
        *("torch", "batch", "budget", "budget_plan", "choose", "microbatch", "plan", "policy", "promise", "ranking"),
        *("nn", "rehearsal"),
    },
    "planner": {"torch", "arguments", "batch", "budget_plan", "plan", "ranking", "search", "strategies"},
    "__init__": {"choose", "delta", "ledger", "microbatch", "nn", "optimizer", "plan", "planner", "policy", "ranking"},
}


def imported(path: Path) -> set[str]:
    """Rooms of trady_triton and packages from elsewhere that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(f"{node.module}.{node.names[0].name}" if node.module == "trady_triton" else node.module)
    rooms = {name.split(".")[1] if name.startswith("trady_triton.") else name.split(".")[0] for name in names}
    return rooms - set(sys.stdlib_module_names)


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room):
    path = ROOT / "trady_triton" / room
    files = list(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    for file in files:
        assert imported(file) <= ALLOWED[room] | {room}, file


def test_every_room_is_in_the_table():
    rooms = {
        path.stem
        for path in (ROOT / "trady_triton").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"app", "integrations"} == set(ALLOWED)


@pytest.mark.parametrize(
    ("file", "packages"),
    [
        ("__init__", set()),
        ("accelerate", {"torch", "accelerate"}),
        ("hf", {"torch", "transformers"}),
        ("hf_layers", {"torch", "transformers"}),
        ("lightning", {"torch", "lightning"}),
    ],
)
def test_an_integration_needs_the_core_and_its_package_alone(file, packages):
    path = ROOT / "trady_triton" / "integrations" / f"{file}.py"
    core = {"integrations", "nn", "optimizer", "policy"}
    assert imported(path) <= packages | core


def test_benchmarks_build_on_the_library_and_models_and_not_on_the_app():
    files = list((ROOT / "bench").rglob("*.py"))
    assert files
    for file in files:
        assert "app" not in imported(file), file


def test_models_build_on_timm_torchvision_and_the_lower_rooms():
    allowed = {"torch", "timm", "torchvision", "safetensors", "trady_triton"}
    for file in (ROOT / "models").rglob("*.py"):
        assert imported(file) <= {
            *allowed,
            "models",
            "cost",
            "ranking",
            "functional",
            "nn",
            "optimizer",
            "policy",
            "registry",
            "slot",
        }, file


def test_the_core_needs_neither_timm_nor_triton():
    code = (
        "import sys; sys.modules['triton'] = sys.modules['timm'] = None\n"
        "import torch, trady_triton as t\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))\n"
        "ranking = t.rank_layers(net, [(torch.ones(2, 4), None)], lambda y, _: y.sum())\n"
        "plan = t.make_plan(ranking, budget=20)\n"
        "optimizer = t.TraDyOptimizer(t.apply_plan(net, plan).parameters(), plan)\n"
        "optimizer.resample(0); net(torch.ones(2, 4)).sum().backward(); optimizer.step()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
