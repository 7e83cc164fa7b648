"""The paper's measurements over a grid of recorded runs and of results: tables as lists of rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from trady_triton import Plan, make_plan
from trady_triton.app.cell import network, resident
from trady_triton.app.recording import Recording, record_run
from trady_triton.app.spec import Spec
from trady_triton.cost import CostModel
from trady_triton.ranking import Ranking
from trady_triton.serial import write_json
from trady_triton.stats import better, coverage, paired_t_test, spearman, t_test
from trady_triton.strategies import strategy

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A recording and which net, data set and seed it is of."""

    net: str
    data: str
    seed: int
    recording: Recording


def record_all(
    spec: Spec, out: Path, data_folder: str, device: torch.device, on_run: Callable[[str, int], None]
) -> list[Run]:
    """Record every net x data set x seed of a grid, at its first learning rate; what is recorded already is read."""
    (out / "recordings").mkdir(parents=True, exist_ok=True)
    runs = []
    cases = [(net, data, seed) for seed in spec.seeds for net in spec.nets for data in spec.data]
    for number, (net, data, seed) in enumerate(cases, 1):
        about = {"net": asdict(net), "data": asdict(data), "seed": seed, "lr": spec.lrs[0], **asdict(spec.protocol)}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        path = out / "recordings" / f"{net.name}-{data.name}-s{seed}-{digest}.json"
        if not path.exists():
            images = resident(net, data, data_folder, device)
            torch.manual_seed(seed)
            model = network(net, data_folder, images.num_classes).to(device)
            protocol = spec.protocol
            recording = record_run(
                model,
                images,
                epochs=protocol.epochs,
                batch_size=protocol.batch_size,
                lr=spec.lrs[0],
                max_grad_norm=protocol.max_grad_norm,
                seed=seed,
            )
            recording.save(path, about)
            on_run(path.stem, len(cases) - number)
        runs.append(Run(net.name, data.name, seed, Recording.load(path)[0]))
    return runs


def ship_rankings(spec: Spec, runs: Sequence[Run], folder: Path) -> None:
    """Write the ranking of each net's first run, with how it was made, for `trady_triton.models.ranking_for`."""
    protocol, data = spec.protocol, spec.data[0]
    for net in spec.nets:
        run = next(run for run in runs if (run.net, run.data, run.seed) == (net.name, data.name, spec.seeds[0]))
        norms = [[float(f"{norm:.5g}") for norm in layer.norms] for layer in run.recording.ranking.layers]
        layers = [{**asdict(x), "norms": n} for x, n in zip(run.recording.ranking.layers, norms, strict=True)]
        per_class = f", {data.train_per_class} images a class" if data.train_per_class else ""
        clip = f", clipped to norm {protocol.max_grad_norm:g} (norms before that)" if protocol.max_grad_norm else ""
        made = {
            "net": net.name,
            "args": dict(net.args),
            "weights": Path(net.weights).stem if net.weights else "random",
            "image_size": net.image_size,
            "how": f"gradient norms of full fine-tuning on {data.name}{per_class}, {net.image_size} px: "
            f"{protocol.epochs} epochs, batch {protocol.batch_size}, SGD, lr {spec.lrs[0]:g}{clip}",
            "torch": torch.__version__,
        }
        name = Path(net.weights).stem if net.weights else net.name
        write_json(
            folder / f"{name}.json", "ranking", {**asdict(run.recording.ranking), "layers": layers, "made": made}
        )


def tail_table(runs: Sequence[Run]) -> list[Row]:
    """Tail index of each epoch: of all gradients together, and over the layers one by one."""
    rows = []
    for run in runs:
        for epoch, alpha in enumerate(run.recording.alpha):
            layers = [values[epoch] for values in run.recording.layer_alpha.values() if math.isfinite(values[epoch])]
            rows.append(
                {
                    "net": run.net,
                    "data": run.data,
                    "seed": run.seed,
                    "epoch": epoch,
                    "alpha": alpha,
                    "layers_min": min(layers),
                    "layers_median": median(layers),
                    "layers_max": max(layers),
                }
            )
    return rows


def net_table(runs: Sequence[Run]) -> list[Row]:
    """Of each net's first run: its tails, and how many layers hold 97.6 % of the RGN (the paper's K)."""
    rows = []
    for run in {run.net: run for run in reversed(runs)}.values():
        ranking, tails = run.recording.ranking, tail_table([run])
        layers = [row["layers_median"] for row in tails]
        whole = sum(layer.shape.weights + layer.shape.inputs for layer in ranking.layers)
        rows.append({"net": run.net, "data": run.data, "seed": run.seed, "layers": len(ranking.layers),
                     "k": len(make_plan(ranking, budget=whole).pool), "alpha_min": min(run.recording.alpha),
                     "alpha_max": max(run.recording.alpha), "layers_min": min(layers), "layers_max": max(layers),
                     "accuracy": run.recording.accuracy[-1]})  # fmt: skip
    return rows


def layer_table(runs: Sequence[Run]) -> list[Row]:
    """Spearman of the layers' cumulated norms between any two runs of a net."""
    return [
        {**_pair(one, other), "spearman": spearman(_layer_norms(one), _layer_norms(other)),
         "spearman_rgn": spearman(_layer_rgn(one), _layer_rgn(other))}
        for one, other in _pairs(runs)
    ]  # fmt: skip


def channel_table(runs: Sequence[Run]) -> list[Row]:
    """How alike the channels of two runs are: the paper's t-test, and what it does not say, whether they rank alike.

    `spearman` is over all channels of the net, which the differences between layers dominate; `spearman_inside` is
    the mean over the layers of the correlation inside one layer.
    """
    rows = []
    for one, other in _pairs(runs):
        x, y = _channel_norms(one), _channel_norms(other)
        inside = [
            spearman(torch.tensor(a.norms), torch.tensor(b.norms))
            for a, b in zip(one.recording.ranking.layers, other.recording.ranking.layers, strict=True)
            if len(a.norms) > 2
        ]
        rows.append({**_pair(one, other), "t_test_p": t_test(x.tolist(), y.tolist()).p, "spearman": spearman(x, y),
                     "spearman_inside": mean(value for value in inside if math.isfinite(value))})  # fmt: skip
    return rows


def planned(spec: Spec, ranking: Ranking) -> dict[tuple[str, int | str], Plan]:
    """A plan at each budget of each strategy that has one and of which something can be told without training."""
    kinds = [(method, strategy(method.sampler)) for method in spec.strategies]
    return {
        (method.name, budget): make_plan(ranking, budget=budget, sampler=method.sampler, **method.options)
        for method, kind in kinds
        if kind.has_budget and kind.is_self_contained
        for budget in spec.budgets
    }


def coverage_table(plans: Mapping[tuple[str, int | str], Plan], epochs: int = 55) -> list[Row]:
    """Share of the pool's channels that were trained at least once, by epoch."""
    rows = []
    for (name, budget), plan in plans.items():
        counts = {layer: plan.shapes[layer].in_channels for layer in plan.pool}
        shares = coverage([plan.sample(epoch) for epoch in range(epochs)], counts)
        rows += [{"strategy": name, "budget": budget, "epoch": e + 1, "covered": s} for e, s in enumerate(shares)]
    return rows


def saving_table(plans: Mapping[tuple[str, int | str], Plan]) -> list[Row]:
    """What a plan is expected to save of weight gradients, stored inputs and FLOPs."""
    rows = []
    for (name, budget), plan in plans.items():
        saved = plan.expected(100)
        rows.append({"strategy": name, "budget": budget, "layers": len(plan.pool), "channels": saved.channels,
                     "weights": saved.weight_saving, "activations": saved.activation_saving,
                     "dw_flops": saved.wgrad_flops_saving, "dx_flops": saved.dgrad_flops_saving})  # fmt: skip
    return rows


def strategy_table(results: Sequence[Mapping[str, str]]) -> list[Row]:
    """Mean and standard deviation over the seeds of each strategy, and what a step of it takes."""
    rows = []
    for key in dict.fromkeys((r["net"], r["data"], r["budget"], r["strategy"], r["lr"]) for r in results):
        same = [r for r in results if (r["net"], r["data"], r["budget"], r["strategy"], r["lr"]) == key]
        accuracy = [float(r["accuracy"]) for r in same if r["accuracy"]]
        rows.append({
            **dict(zip(("net", "data", "budget", "strategy", "lr"), key, strict=True)),
            "runs": len(same),
            "diverged": len(same) - len(accuracy),
            "accuracy": mean(accuracy) if accuracy else math.nan,
            "std": stdev(accuracy) if len(accuracy) > 1 else math.nan,
            **{name: mean(float(r[name]) for r in same if r.get(name)) if any(r.get(name) for r in same) else math.nan
               for name in ("kept_bytes", "peak_bytes", "forward_flops", "dgrad_flops", "wgrad_flops",
                            "probed_batches")},
        })  # fmt: skip
    return rows


def comparison_table(results: Sequence[Mapping[str, str]]) -> list[Row]:
    """Every strategy against every other over the conditions that both ran: mean difference and paired tests.

    A condition is net, data set, budget and seed; a strategy without a budget is its own partner at every budget.
    `p_better` is one-sided, that the row's strategy is better.
    """
    found = _accuracies(results)
    names = list(dict.fromkeys(r["strategy"] for r in results))
    rows = []
    for one in names:
        for other in names:
            shared = sorted(found[one].keys() & found[other].keys()) if one != other else []
            if len(shared) < 2:
                continue
            x, y = ([found[name][condition] for condition in shared] for name in (one, other))
            test = paired_t_test(x, y)
            rows.append({"strategy": one, "other": other, "pairs": len(shared), "difference": mean(x) - mean(y),
                         "wins": sum(a > b for a, b in zip(x, y, strict=True)), "t": test.t, "p": test.p,
                         "p_better": better(x, y)})  # fmt: skip
    return rows


def _accuracies(results: Sequence[Mapping[str, str]]) -> dict[str, dict[tuple[str, ...], float]]:
    budgets = [budget for budget in dict.fromkeys(r["budget"] for r in results) if budget]
    found: dict[str, dict[tuple[str, ...], float]] = {r["strategy"]: {} for r in results}
    for r in results:
        for budget in [r["budget"]] if r["budget"] else budgets:
            if r["accuracy"]:
                found[r["strategy"]][r["net"], r["data"], budget, r["seed"]] = float(r["accuracy"])
    return found


def _pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    return [(one, other) for one, other in combinations(runs, 2) if one.net == other.net]


def _pair(one: Run, other: Run) -> Row:
    return {"net": one.net, "data": one.data, "seed": one.seed, "other_data": other.data, "other_seed": other.seed}


def _layer_norms(run: Run) -> torch.Tensor:
    return torch.tensor([math.fsum(layer.norms) for layer in run.recording.ranking.layers], dtype=torch.float64)


def _layer_rgn(run: Run) -> torch.Tensor:
    return torch.tensor([layer.rgn(CostModel()) for layer in run.recording.ranking.layers], dtype=torch.float64)


def _channel_norms(run: Run) -> torch.Tensor:
    return torch.tensor([norm for layer in run.recording.ranking.layers for norm in layer.norms], dtype=torch.float64)
