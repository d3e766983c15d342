"""Run a comparison: cell by cell, resumable, one process for each."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorakit.compare.cells import Cell, directory_of, plan_cells, read_record
from lorakit.compare.classify_scores import require_scores
from lorakit.compare.config import CompareConfig
from lorakit.compare.estimate import Forecast, forecast
from lorakit.compare.files import DataFiles, find_data
from lorakit.compare.sharing import Sharing
from lorakit.compare.summary import document
from lorakit.compare.worker import Order, work
from lorakit.compare.write import write_results
from lorakit.environment import command_line
from lorakit.errors import LorakitError, OutputError, RequestError, WorkError, unknown_name
from lorakit.files import write_text
from lorakit.formatting import format_duration, format_number
from lorakit.train.interrupt import TrainingPaused
from lorakit.train.prepare import prepare
from lorakit.train.run import Say, say_on_stderr

_LOG_LINES = 6


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """What a comparison has so far.

    Attributes:
        directory: its output.
        document: what compare.json says.
        remaining: names of the cells that are not finished.
    """

    directory: Path
    document: dict[str, Any]
    remaining: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which cells a call runs.

    Attributes:
        only: names of methods; empty: all.
        max_cells: stop after so many; None: no limit.
    """

    only: Sequence[str] = field(default_factory=tuple)
    max_cells: int | None = None


def compare(
    config: CompareConfig,
    *,
    choice: Choice | None = None,
    say: Say = say_on_stderr,
) -> CompareResult:
    """Run what is not finished, and write compare.json, compare.csv and report.html.

    Every method is checked against the model and the data before the first one trains. A cell is
    finished when its record is written; the others are run, from their checkpoint where they have
    one. Ctrl-C saves the running cell first.

    Args:
        config: the comparison.
        choice: which cells to run; by default all.
        say: takes a line for each cell.

    Raises:
        RequestError: what is asked for cannot be, or a finished cell was run with another config.
        WorkError: a run failed for a reason that is not its learning rate.
        TrainingPaused: Ctrl-C or SIGTERM; the same call goes on.
    """
    choice = choice or Choice()
    started = time.perf_counter()
    data = find_data(config)
    comparison = _Comparison(config, data, _chosen(config, choice))
    with _locked(Path(config.output)):
        _check_plans(comparison.runnable(), config, data)
        write_text(Path(config.output) / "compare.yaml", config.to_yaml())
        say(f"{len(comparison.records)} of {len(comparison.cells())} cells are finished")
        num_run = 0
        comparison.sharing.check(comparison.chosen(), comparison.records, say)
        while (cell := comparison.next()) and num_run != choice.max_cells:
            left = None if choice.max_cells is None else choice.max_cells - num_run
            group = comparison.sharing.group_of(cell, comparison.runnable())[:left]
            comparison.run(group, say)
            num_run += len(group)
            comparison.write(time.perf_counter() - started)
        found = comparison.write(time.perf_counter() - started)
        left = comparison.remaining()
    return CompareResult(
        directory=Path(config.output),
        document=found,
        remaining=tuple(cell.name for cell in left),
    )


def plan_compare(config: CompareConfig, *, choice: Choice | None = None) -> Forecast:
    """The cells, which of them are finished, and how long the others may take; writes nothing.

    Raises:
        RequestError: as `compare`.
    """
    data = find_data(config, write=False)
    comparison = _Comparison(config, data, _chosen(config, choice or Choice()))
    return forecast(comparison.cells(), comparison.records)


class _Comparison:
    """The cells of a comparison and their records."""

    def __init__(self, config: CompareConfig, data: DataFiles, arms: frozenset[str]) -> None:
        self.config = config
        self.data = data
        self.arms = arms
        self.sharing = Sharing(config.together)
        self.records: dict[str, dict[str, Any]] = {}
        self._read()

    def cells(self) -> list[Cell]:
        """All cells of all methods, as far as they are known."""
        return plan_cells(self.config, self.data, self.records)

    def chosen(self) -> list[Cell]:
        """The cells of the methods chosen."""
        return [cell for cell in self.cells() if cell.arm.slug in self.arms]

    def remaining(self) -> list[Cell]:
        """Those that are not finished."""
        return [cell for cell in self.chosen() if cell.name not in self.records]

    def runnable(self) -> list[Cell]:
        """The remaining cells whose rate and length are known."""
        return [cell for cell in self.remaining() if cell.config is not None]

    def next(self) -> Cell | None:
        """The first cell to run."""
        return next(iter(self.runnable()), None)

    def run(self, cells: Sequence[Cell], say: Say) -> None:
        """Run one cell, or several together, in a process of its own, and read their records."""
        first = directory_of(self.config, cells[0])
        log = first.with_name(f"{first.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        _in_process([self._order(cell) for cell in cells], log)
        for cell in cells:
            directory = directory_of(self.config, cell)
            record = read_record(directory, cell)
            if record is None:
                raise WorkError("a run left no record", where=str(directory), remedy=f"see {log}")
            self.records[cell.name] = record
        # What these cells settled may name a run that an earlier call has finished.
        self._read()
        left = len(self.remaining())
        for cell in cells:
            record = self.records[cell.name]
            took = format_duration(record["seconds"])
            how = f"together with {len(cells) - 1} others, " if len(cells) > 1 else ""
            say(f"{cell.name}: {_outcome(record)}, {how}{took}; {left} to go")

    def _order(self, cell: Cell) -> Order:
        assert cell.config is not None
        return Order(
            config=cell.config,
            header={
                "arm": cell.arm.name,
                "method": cell.arm.method,
                "cell": cell.name,
                "kind": cell.kind,
                "lr": cell.lr,
                "seed": cell.seed,
                "sha256": cell.sha256,
                "identity": cell.identity(),
            },
            measures=cell.measures,
            evaluation=self.data.source,
            keep_weights=self.config.keep_weights and cell.kind == "final",
        )

    def write(self, seconds: float) -> dict[str, Any]:
        """Write what is known so far; returns compare.json's content."""
        found = document(
            self.config, self.data, self.records, seconds=seconds, command=command_line()
        )
        write_results(Path(self.config.output), found)
        return found

    def _read(self) -> None:
        """Read records until no further cell becomes known through them."""
        while True:
            before = len(self.records)
            for cell in self.cells():
                if cell.config is None or cell.name in self.records:
                    continue
                record = read_record(directory_of(self.config, cell), cell)
                if record is not None:
                    self.records[cell.name] = record
            if len(self.records) == before:
                return


def _chosen(config: CompareConfig, choice: Choice) -> frozenset[str]:
    """The slugs of the methods to run."""
    names = {arm.name: arm.slug for arm in config.arms}
    for wanted in choice.only:
        if wanted not in names and wanted not in names.values():
            raise unknown_name(
                RequestError,
                f"there is no method named {wanted!r} in this comparison",
                wanted,
                names,
                where="--only",
            )
    if choice.max_cells is not None and choice.max_cells < 0:
        raise RequestError(
            "--max-cells is out of range", expected=">= 0", found=str(choice.max_cells)
        )
    return frozenset(names.get(name, name) for name in choice.only or names)


def _check_plans(cells: Sequence[Cell], config: CompareConfig, data: DataFiles) -> None:
    """Prepare one run of each method: refusals come before the first training."""
    first = next((cell.config for cell in cells if cell.config is not None), None)
    if first is not None:
        require_scores(first, data.source, config.eval.metrics, config.eval.limit)
    seen: set[str] = set()
    for cell in cells:
        if cell.arm.slug in seen or cell.config is None:
            continue
        seen.add(cell.arm.slug)
        try:
            prepare(cell.config)
        except RequestError as error:
            where = f"{cell.arm.where}, {error.where}" if error.where else cell.arm.where
            raise type(error)(
                error.what,
                where=where,
                expected=error.expected,
                found=error.found,
                remedy=error.remedy,
            ) from error


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    if output.is_file():
        raise OutputError(
            "the output is a file", where=str(output), expected="a directory of a comparison"
        )
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise OutputError(
            "this comparison is already running",
            where=str(output),
            remedy="wait for the other process, or choose another output",
        ) from error


def _in_process(orders: Sequence[Order], log: Path) -> None:
    """Run orders in a fresh process; its error is raised here.

    Where the system has one, a fork server imports torch once for all cells: each begins as a
    fresh process would after its imports.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=work, args=(orders, str(log), sender), name=orders[0].header["cell"]
    )
    with _term_as_interrupt():
        process.start()
        sender.close()
        try:
            error = _answer(receiver)
            process.join()
        except KeyboardInterrupt as interrupted:
            raise _stopped(process, log) from interrupted
    if isinstance(error, LorakitError):
        raise error
    if process.exitcode != 0:
        raise WorkError(
            "the process of a run was killed",
            where=str(log),
            found=f"exit code {process.exitcode}" + _tail(log),
            remedy="if it ran out of memory, lower train.batch_size; the same command goes on",
        )


def _context() -> SpawnContext | ForkServerContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorakit.compare.worker"])
    return context


def _answer(receiver: Any) -> LorakitError | None:
    try:
        return receiver.recv()
    except EOFError:
        return None


@contextmanager
def _term_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C: the running cell is to be saved, not orphaned."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:
        # Not the main thread: signals are not ours to take.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped(process: BaseProcess, log: Path) -> TrainingPaused:
    """End the running cell as Ctrl-C would, and wait until it has saved."""
    # The cell has its own process group: a terminal's Ctrl-C did not reach it. A second signal
    # ends it at once.
    process.terminate()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()
        process.join()
    return TrainingPaused(
        "the comparison was stopped; the finished cells and the last checkpoint are saved",
        where=str(log),
        remedy="run the same command to go on",
    )


def _outcome(record: Mapping[str, Any]) -> str:
    if record["failed"]:
        return "failed: " + str(record["failed"]).splitlines()[0]
    shown = {name: score["value"] for name, score in record["scores"].items()}
    if not shown and record["eval_loss"] is not None:
        shown = {"validation loss": record["eval_loss"]}
    return ", ".join(f"{name} {format_number(float(value))}" for name, value in shown.items())


def _tail(log: Path) -> str:
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "".join(f"\n{line}" for line in lines[-_LOG_LINES:])
