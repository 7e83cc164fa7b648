"""Runs cases in processes of their own, one a net, with a progress bar; a process that dies costs its case alone."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trady_triton.bench.methods import METHODS
from trady_triton.bench.nets import Net
from trady_triton.bench.store import Row, Store
from trady_triton.bench.worker import MARK

CASE_LIMIT = 300.0  # seconds, after which a case is given up
OUT_OF_TIME = "the time for the benchmark was up; run it again to go on"


@dataclass(frozen=True)
class Case:
    """A method on a net, `micro_batch` samples at a time."""

    net: Net
    method: str
    budgets: tuple[str, ...]
    repeats: int
    micro_batch: int | None = None

    @property
    def name(self) -> str:
        """Its place in the file of results."""
        return f"{self.net.name}/{self.method}" + (f"/{self.micro_batch}" if self.micro_batch else "")

    @property
    def inputs(self) -> Row:
        """All that its row depends on, beside the code."""
        return {"net": self.net.described(), "method": self.method, "budgets": list(self.budgets),
                "repeats": self.repeats, "micro_batch": self.micro_batch}  # fmt: skip


class Runner:
    """Runs cases that the store does not hold yet, until `minutes` are over; then the rest says that it was not run."""

    def __init__(self, store: Store, console: Console, minutes: float, title: str) -> None:
        self.store, self.console = store, console
        self.deadline = time.monotonic() + 60 * minutes
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(title, total=None)

    def __enter__(self) -> Runner:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def run(self, cases: list[Case]) -> None:
        """Every case gets a row."""
        self.progress.update(self.task, total=len(cases))
        waiting = [case for case in cases if not self.store.is_done(case.name, case.inputs)]
        self.progress.advance(self.task, len(cases) - len(waiting))
        while waiting:
            if time.monotonic() > self.deadline:
                for case in waiting:
                    self._put(case, {"status": "unfinished", "why": OUT_OF_TIME})
                return
            job = _next_job(waiting)
            self.progress.update(self.task, description=f"{job[0].net.name}: {METHODS[job[0].method].label}")
            done = self._run_job(job)
            waiting = [case for case in waiting if case not in done]

    def _run_job(self, job: list[Case]) -> list[Case]:
        """Run cases of one net in one process; returns those that now have a row."""
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen([sys.executable, "-m", "trady_triton.bench.worker"], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=errors, text=True)  # fmt: skip
            done = []
            for case, row in zip(job, self._rows(process, job), strict=False):
                self._put(case, row)
                done.append(case)
            if len(done) < len(job):
                out_of_time = time.monotonic() > self.deadline
                status = "unfinished" if out_of_time else "failed"
                why = OUT_OF_TIME if out_of_time else _last_words(process.returncode, errors)
                self._put(job[len(done)], {"status": status, "why": why})
                done.append(job[len(done)])
        return done

    def _rows(self, process: subprocess.Popen[str], job: list[Case]) -> Iterator[Row]:
        """The rows as they come. A process that is silent for too long is killed."""
        assert process.stdin is not None
        assert process.stdout is not None
        first = job[0]
        process.stdin.write(json.dumps({"net": first.net.described(), "budgets": first.budgets,
                                        "repeats": first.repeats,
                                        "cases": [[c.method, c.micro_batch] for c in job]}))  # fmt: skip
        process.stdin.close()
        alarm = self._alarm(process)
        try:
            for line in process.stdout:
                if line.startswith(MARK):
                    alarm.cancel()
                    yield json.loads(line[len(MARK) :])
                    alarm = self._alarm(process)
        finally:
            alarm.cancel()
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
            process.wait()

    def _alarm(self, process: subprocess.Popen[str]) -> threading.Timer:
        left = min(CASE_LIMIT, max(0.0, self.deadline - time.monotonic()))
        alarm = threading.Timer(left, process.kill)
        alarm.daemon = True
        alarm.start()
        return alarm

    def _put(self, case: Case, row: Row) -> None:
        base = {**case.net.described(), "method": case.method, "label": METHODS[case.method].label,
                "micro_batch": case.micro_batch}  # fmt: skip
        self.store.put(case.name, case.inputs, base | row)
        self.progress.advance(self.task)
        if not self.console.is_terminal:
            why = f": {row['why']}" if "why" in row else ""
            self.console.print(f"{case.name} {row['status']}{why}", highlight=False, soft_wrap=True)


def _next_job(waiting: list[Case]) -> list[Case]:
    """The first case, with those after it of its net that may share its process: what is compiled runs alone."""
    first = waiting[0]
    if METHODS[first.method].is_compiled:
        return [first]
    same = (first.net, first.budgets, first.repeats)
    return list(
        itertools.takewhile(
            lambda case: (case.net, case.budgets, case.repeats) == same and not METHODS[case.method].is_compiled,
            waiting,
        )
    )


def _last_words(code: int | None, errors: Any) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    if code is not None and code < 0:
        return f"its process was ended by signal {-code}: it took too long, or too much memory"
    return f"its process ended with code {code}: {lines[-1][:300] if lines else 'without a word'}"
