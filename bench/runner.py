"""Runs cases in a process of their own, with a progress bar; a process that dies costs its case alone."""

from __future__ import annotations

import contextlib
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
from trady_triton.bench.worker import LOST, MARK

CASE_LIMIT = 300.0  # seconds, after which a case is given up
WORKER = [sys.executable, "-m", "trady_triton.bench.worker"]
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
        """All that its row depends on, beside the code; what the worker is told."""
        return {"net": self.net.described(), "method": self.method, "budgets": list(self.budgets),
                "repeats": self.repeats, "micro_batch": self.micro_batch}  # fmt: skip

    def described(self) -> Row:
        """What every row of it says first."""
        return {**self.net.described(), "method": self.method, "label": METHODS[self.method].label,
                "micro_batch": self.micro_batch or self.net.batch}  # fmt: skip


Entry = tuple[Store, Case]  # a case, and where its row goes


class Runner:
    """Runs cases whose store does not hold them yet, until `minutes` are over; then the rest says it was not run."""

    def __init__(self, console: Console, minutes: float, title: str) -> None:
        self.console = console
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

    def run(self, entries: list[Entry]) -> None:
        """Every case gets a row."""
        self.progress.update(self.task, total=len(entries))
        waiting = [(store, case) for store, case in entries if not store.is_done(case.name, case.inputs)]
        self.progress.advance(self.task, len(entries) - len(waiting))
        while waiting:
            if time.monotonic() > self.deadline:
                for entry in waiting:
                    self._put(entry, {"status": "unfinished", "why": OUT_OF_TIME})
                return
            done = self._run_job(_next_job(waiting))
            waiting = waiting[done:]

    def _run_job(self, job: list[Entry]) -> int:
        """Run cases in one process; returns how many of them now have a row."""
        with tempfile.TemporaryFile("w+") as errors:
            pipe = subprocess.PIPE
            process = subprocess.Popen(WORKER, stdin=pipe, stdout=pipe, stderr=errors, text=True)
            done = 0
            self._announce(job[0][1])
            for row in self._rows(process, [case for _, case in job]):
                self._put(job[done], row)
                done += 1
                if done < len(job):
                    self._announce(job[done][1])
            if done < len(job) and not (done and process.returncode == LOST):
                out_of_time = time.monotonic() > self.deadline
                status = "unfinished" if out_of_time else "failed"
                why = OUT_OF_TIME if out_of_time else _last_words(process.returncode, errors)
                self._put(job[done], {"status": status, "why": why})
                done += 1
        return done

    def _announce(self, case: Case) -> None:
        self.progress.update(self.task, description=f"{case.net.name}: {METHODS[case.method].label}")

    def _rows(self, process: subprocess.Popen[str], cases: list[Case]) -> Iterator[Row]:
        """The rows as they come. A process that is silent for too long is killed."""
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # its exit code will say why it does not listen
            process.stdin.write(json.dumps([case.inputs for case in cases]))
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

    def _put(self, entry: Entry, row: Row) -> None:
        store, case = entry
        store.put(case.name, case.inputs, case.described() | row)
        self.progress.advance(self.task)
        if not self.console.is_terminal:
            why = f": {row['why']}" if "why" in row else ""
            self.console.print(f"{case.name} {row['status']}{why}", highlight=False, soft_wrap=True)


def _next_job(waiting: list[Entry]) -> list[Entry]:
    """The first case, with those after it that may share its process: what is compiled runs alone."""
    if METHODS[waiting[0][1].method].is_compiled:
        return waiting[:1]
    return list(itertools.takewhile(lambda entry: not METHODS[entry[1].method].is_compiled, waiting))


def _last_words(code: int | None, errors: Any) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    if code is not None and code < 0:
        return f"its process was ended by signal {-code}: it took too long, or too much memory"
    return f"its process ended with code {code}: {lines[-1][:300] if lines else 'without a word'}"
