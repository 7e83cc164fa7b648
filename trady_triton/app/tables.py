"""What the command prints: the table of a plan, the bar and the lines of a run."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trady_triton import Ledger, Plan
from trady_triton.app.finetune import Record
from trady_triton.app.planning import mean_channels, smallest_budget
from trady_triton.app.train import Tally
from trady_triton.cost import LayerShape
from trady_triton.meters import KINDS


def plan_table(plan: Plan) -> Table:
    """Every ranked layer in the order of the forward: what a channel costs, its place in the pool, the mean draw."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("layer", "kind"):
        table.add_column(heading, overflow="fold")  # a narrow terminal folds names rather than cut numbers
    unit = plan.cost.unit
    for heading in ("channels", f"{unit}\neach", f"{unit}\nin all", "rank\nin pool", "drawn\nan epoch"):
        table.add_column(heading, justify="right", no_wrap=True)
    rank = {name: place for place, name in enumerate(plan.pool, 1)}
    drawn = mean_channels(plan)
    for name, shape in plan.shapes.items():
        cost = plan.cost.channel_cost(shape)
        place = (str(rank[name]), f"{drawn[name]:.1f}") if name in rank else ("-", "-")
        row = (name, kind(shape), f"{shape.in_channels:,}", f"{cost:,}", f"{cost * shape.in_channels:,}", *place)
        table.add_row(*row, style=None if name in rank else "dim")
    return table


def plan_summary(plan: Plan) -> str:
    """The budget against what there is, and what training inside it saves."""
    saving = plan.expected()
    unit = plan.cost.unit
    basis = "one sample" if unit == "elements" else f"a batch of {plan.cost.batch_size}"
    channels = sum(plan.shapes[name].in_channels for name in plan.pool)
    size, ranked = len(plan.pool), len(plan.shapes)
    cheapest, least = smallest_budget(plan)
    again = plan.policy.recompute
    units = "1 unit is" if len(again) == 1 else f"{len(again)} units are"
    whole = sum(shape.in_channels * plan.cost.channel_cost(shape) for shape in plan.shapes.values())
    pieces = f", in {plan.policy.recompute_parts} parts of the batch" if plan.policy.recompute_parts > 1 else ""
    promise = ""
    if plan.memory is not None:
        parts = f", {plan.micro_batch} samples at a time" if plan.micro_batch else ""
        promise = f"memory       {plan.memory:,} bytes for a whole step, weights and all{parts}\n"
    return promise + "\n".join(
        (
            f"budget       {plan.budget:,} {unit} for {basis}: "
            f"{plan.budget / plan.pool_cost:.1%} of the pool, {plan.budget / whole:.1%} of all layers",
            f"pool         {size} of {ranked} layers: {channels:,} channels, {plan.pool_cost:,} {unit}",
            f"each epoch   {saving.channels:.1f} channels at {saving.used:,.0f} {unit}, on average",
            f"saved        {saving.weight_saving:.1%} of the weight gradients, {saving.activation_saving:.1%} of the "
            f"stored inputs, {saving.wgrad_flops_saving:.1%} of the dW FLOPs, {saving.dgrad_flops_saving:.1%} of dX",
            f"computed     {saving.step_flops / 1e6:,.1f} MFLOP a sample: forward {saving.forward_flops / 1e6:,.1f}, "
            f"dX {saving.dgrad_flops / 1e6:,.1f}, dW {saving.wgrad_flops / 1e6:,.2f}",
            *([f"drawn by     {plan.sampler}"] if plan.sampler != "trady" else []),
            *([f"depth        drawn too: at most {plan.dgrad_budget:.0%} of dX is expected"] if plan.depths else []),
            f"fits         from {least:,} {unit} on (one channel of {cheapest})",
            *([f"always       {', '.join(plan.head)}: trained whole, outside the budget"] if plan.head else []),
            *([f"stored as    {plan.store}, by stochastic rounding"] if plan.store_bits else []),
            *([f"recomputed   {units} run again in the backward{pieces}: exact"] if again else []),
        )
    )


def ledger_table(books: Mapping[str, Ledger]) -> Table:
    """Ledgers side by side, one column a method: memory in MiB, what is kept by kind, what is not lean, FLOPs."""
    columns = {method: _ledger_rows(entry) for method, entry in books.items()}
    first = next(iter(books.values()))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(f"one step of {first.batch_size} samples, {first.device}", no_wrap=True)
    for method in columns:
        table.add_column(method, justify="right", no_wrap=True)
    for row in max(columns.values(), key=len):
        table.add_row(row, *(rows.get(row, "-") for rows in columns.values()))
    return table


def _ledger_rows(entry: Ledger) -> dict[str, str]:
    memory = {
        "weights and buffers": entry.weight_bytes,
        "batch": entry.batch_bytes,
        "ids of drawn channels": entry.draw_bytes,
        "optimizer state": entry.state_bytes,
        "peak of the step beyond these": entry.peak_bytes,
        "in all": entry.total_bytes,
        "gradients, compact": entry.compact_gradient_bytes,
        "gradients of what is trained whole": entry.whole_gradient_bytes,
        "kept for the backward": entry.kept_bytes,
        **{f"  {kind}": entry.kept_by_kind.get(kind, 0) for kind in KINDS},
        **{f"  not lean: {kind} ({len(layers)})": sum(layers.values()) for kind, layers in entry.not_lean.items()},
        "peak of inference": entry.inference_bytes,
    }
    flops = {"forward": entry.forward_flops, "dX": entry.dgrad_flops, "dW": entry.wgrad_flops}
    rows = {name: f"{size / 2**20:,.3f} MiB" for name, size in memory.items()}
    return rows | {f"{name} FLOPs": f"{count / 1e6:,.1f} M" for name, count in flops.items()}


def kind(shape: LayerShape) -> str:
    """A layer in a word or two: "linear", "conv 3x3", "depthwise 3x3", "conv 3x3 in 4 groups"."""
    if not shape.kernel_size:
        return "linear"
    size = "x".join(map(str, shape.kernel_size))
    if shape.is_depthwise:
        return f"depthwise {size}"
    return f"conv {size}" + (f" in {shape.groups} groups" if shape.groups > 1 else "")


def record_line(record: Record, epochs: int) -> str:
    """One epoch in one line."""
    return (
        f"epoch {record['epoch'] + 1:>{len(str(epochs))}}/{epochs}  loss {record['loss']:.4f}  "
        f"train {record['train_accuracy']:.1%}  test {record['test_accuracy']:.1%}  {record['seconds']:.1f} s"
    )


class RunBar:
    """A bar over all steps of a run, with running loss and accuracy of the epoch and the time left; a context manager.

    Where the output is no terminal only the line of each epoch is printed.
    """

    def __init__(self, console: Console, *, epochs: int, train_steps: int, done: int) -> None:
        self.console, self.epochs, self.train_steps, self.done = console, epochs, train_steps, done
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(self._title(), total=epochs * train_steps, completed=done, state="")

    def __enter__(self) -> RunBar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def step(self, tally: Tally) -> None:
        """A step is done."""
        self.done += 1
        state = f"loss {tally.loss:.3f}  accuracy {tally.accuracy:.1%}"
        self.progress.update(self.task, completed=self.done, state=state)

    def epoch(self, record: Record) -> None:
        """An epoch is done: print its line."""
        self.console.print(record_line(record, self.epochs), highlight=False)
        self.progress.update(self.task, description=self._title())

    def _title(self) -> str:
        return f"epoch {min(self.done // self.train_steps + 1, self.epochs)}/{self.epochs}"
