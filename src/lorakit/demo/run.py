"""The demo: measure the base, teach it, measure again, merge, prove, report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data.sources import load_rows
from lorakit.demo.task import DemoTask, Row
from lorakit.environment import hardware, peak_memory_bytes, supports_bf16, versions
from lorakit.errors import OutputError
from lorakit.evaluate.options import METRICS, EvalOptions
from lorakit.evaluate.run import EvalResult, ScoredAnswer, evaluate
from lorakit.evaluate.sql import SqlError, extract_sql, run_sql
from lorakit.files import require_free, write_json, write_text
from lorakit.formats.peft import load_adapter
from lorakit.formatting import format_duration
from lorakit.merging.run import MergeRequest, merge_to_disk
from lorakit.models.load import load_model
from lorakit.report.collect import collect
from lorakit.report.html import write_report
from lorakit.train.config import TrainConfig
from lorakit.train.run import train

Say = Callable[[str], None]

MODEL = "smollm2-135m-instruct"
RESULT_NAME = "result.json"
_MARK = ".lorakit-demo"
_NUM_SAMPLES = 5
_SLOWER = 1.4  # answering with an adapter against answering without
_MERGE_S = 40.0
# However slow the machine is, it learns for so long.
_LEAST_S = 180.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRequest:
    """What to run.

    Attributes:
        task: the task.
        output: the directory to leave; an earlier demo there is replaced, anything else is not.
        seed: of the data, the training and the intervals.
        seconds: the time of the whole demo; what is left of it ends the training. None: all
            training rows are learned.
    """

    task: DemoTask
    output: Path
    seed: int = 0
    seconds: float | None = None


def run_demo(request: DemoRequest, say: Say) -> dict[str, Any]:
    """Run the demo from the data to the report.

    Args:
        request: what to run.
        say: takes each line about what is going on.

    Returns:
        The content of result.json.

    Raises:
        OutputError: the output holds something that is not an earlier demo.
        LorakitError: see the steps.
    """
    started = time.monotonic()
    task, output = request.task, request.output
    _make_room(output)
    _write_data(task, output / "data")
    say(f"{len(task.held_out)} questions held out: {task.split}")
    say(f"arithmetic: {_dtype() or 'float32'}")
    before = _measure(task, output, {"base": None}, few_shot=False)
    answered = time.monotonic()
    few_shot = _measure(task, output, {"base": None}, few_shot=True)
    length: dict[str, Any] = {}
    if request.seconds is not None:
        # The adapter answers what the base answered, a little slower; then comes the merge.
        end_s = request.seconds - _SLOWER * (answered - started) - _MERGE_S
        length = _until(end_s - _since(started), say)
    trained = train(_config(request, task, length), say=say)
    shutil.copytree(trained.adapter, output / "adapter")
    shutil.copyfile(trained.directory / "metrics.jsonl", output / "metrics.jsonl")
    after = _measure(task, output, {"adapter": "demo"}, few_shot=False)
    certificate = merge_to_disk(
        MergeRequest(adapter=output / "adapter", output=output / "merged", base=MODEL)
    )
    result = {
        "kind": "demo",
        "title": task.title,
        "subtitle": task.subtitle,
        "command": _command(request),
        "task": task.name,
        "model": MODEL,
        "seed": request.seed,
        "base": _scores(task, before, "base"),
        f"base_{len(task.few_shot)}shot": _scores(task, few_shot, "base"),
        "adapter": _scores(task, after, "adapter"),
        "by_kind": _by_kind(task, before, after),
        "merge": _plain(certificate),
        "samples": _samples(task, output, before, after),
        **_training_facts(task, trained.record),
        "arithmetic": _dtype() or "float32",
        "evaluation_tokens_per_s": after.systems["adapter"].tokens_per_s,
        "peak_memory_bytes": peak_memory_bytes(),
        "seconds": round(time.monotonic() - started, 1),
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(output / RESULT_NAME, result)
    write_report(collect(output), output / "report.html")
    return result


def _command(request: DemoRequest) -> str:
    minutes = "" if request.seconds is None else f" --minutes {request.seconds / 60:g}"
    return f"lorakit demo --task {request.task.name} --seed {request.seed}{minutes}"


def _make_room(output: Path) -> None:
    """Take an earlier demo away; refuse to touch anything else."""
    if (output / _MARK).is_file():
        shutil.rmtree(output)
    try:
        require_free(output)
    except OutputError as error:
        error.remedy = "choose another place: lorakit demo --output DIR"
        raise
    write_text(output / _MARK, "an output of lorakit demo, replaced by the next one\n")


def _write_data(task: DemoTask, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    few_shot = [task.with_examples(row) for row in task.held_out]
    splits = {"train": task.train, "held_out": task.held_out, "held_out_few_shot": few_shot}
    for name, rows in splits.items():
        write_rows(directory / f"{name}.jsonl", rows)
    task.write_databases(directory)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as jsonl."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(path, "\n".join(lines) + "\n")


def _since(started: float) -> float:
    return time.monotonic() - started


def _until(seconds: float, say: Say) -> dict[str, float]:
    """The training options that end it after `seconds`, or after the least time."""
    left_s = max(seconds, _LEAST_S)
    say(f"training ends after {format_duration(left_s)}")
    return {"max_minutes": left_s / 60}


def _num_answers(rows: Sequence[Row]) -> int:
    return sum(m["role"] == "assistant" for row in rows for m in row["messages"])


def _config(request: DemoRequest, task: DemoTask, length: Mapping[str, Any]) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "model": {"ref": MODEL, "dtype": _dtype(), "attention": "grouped"},
            "data": {"train": str(request.output / "data" / "train.jsonl")},
            "lora": dict(task.lora),
            "train": {**task.training, **length},
            "output": str(request.output / "training"),
            "seed": request.seed,
        }
    )


def _dtype() -> str | None:
    """Bfloat16 where the processor multiplies it in hardware, for training and measuring alike."""
    return "bfloat16" if supports_bf16() else None


def _measure(
    task: DemoTask, output: Path, systems: Mapping[str, str | None], *, few_shot: bool
) -> EvalResult:
    model, tokenizer = load_model(MODEL, dtype=_dtype())
    for adapter in systems.values():
        if adapter is not None:
            load_adapter(model, output / "adapter", name=adapter)
    name = "held_out_few_shot" if few_shot else "held_out"
    options = EvalOptions(
        metrics=tuple(task.metrics.values()),
        max_new_tokens=task.max_new_tokens,
        batch_size=task.batch_size,
    )
    rows = load_rows(output / "data" / f"{name}.jsonl")
    return evaluate(model, tokenizer, rows, options, systems=systems)


def _scores(task: DemoTask, result: EvalResult, system: str) -> dict[str, Any]:
    scores = result.systems[system].scores
    return {name: scores[metric].to_json() for name, metric in task.metrics.items()}


def _by_kind(task: DemoTask, before: EvalResult, after: EvalResult) -> dict[str, Any]:
    """Right answers per kind of question: [base, adapter, asked]."""
    metric = _verdict(task)
    found: dict[str, list[int]] = {}
    if not before.questions:
        return {}
    for i, question in enumerate(before.questions):
        kind = str(task.held_out[question.rows[0]].get("intent", "all"))
        counts = found.setdefault(kind, [0, 0, 0])
        counts[0] += before.systems["base"].answers[i].scores.get(metric, 0.0) == 1.0
        counts[1] += after.systems["adapter"].answers[i].scores.get(metric, 0.0) == 1.0
        counts[2] += 1
    return {
        kind: f"base {base}, adapter {adapter}, of {asked}"
        for kind, (base, adapter, asked) in sorted(found.items())
    }


def _verdict(task: DemoTask) -> str:
    """The metric that says of one written answer whether it is right."""
    return next(m for m in task.metrics.values() if METRICS[m].needs == "answers")


def _samples(
    task: DemoTask, output: Path, before: EvalResult, after: EvalResult
) -> list[dict[str, Any]]:
    """Five questions spread over the held-out ones, with both answers and the rows they return."""
    count = len(before.questions)
    places = [i * count // _NUM_SAMPLES for i in range(min(_NUM_SAMPLES, count))]
    samples: list[dict[str, Any]] = []
    for place in places:
        row = task.held_out[before.questions[place].rows[0]]
        database = output / "data" / row["database"] if "database" in row else None
        reference = row["messages"][-1]["content"]
        samples.append(
            {
                "question": row["messages"][-2]["content"],
                "reference": reference,
                "reference_rows": _rows(database, reference)[0],
                "answers": {
                    "base": _answer(task, database, before.systems["base"].answers[place]),
                    "adapter": _answer(task, database, after.systems["adapter"].answers[place]),
                },
            }
        )
    return samples


def _answer(task: DemoTask, database: Path | None, answer: ScoredAnswer) -> dict[str, Any]:
    metric = _verdict(task)
    rows, error = _rows(database, answer.text)
    return {
        "text": answer.text,
        "ok": answer.scores.get(metric) == 1.0,
        "rows": rows,
        "error": error,
    }


def _rows(database: Path | None, text: str) -> tuple[list[Sequence[Any]] | None, str | None]:
    if database is None:
        return None, None
    try:
        return [list(row) for row in run_sql(database, extract_sql(text))], None
    except SqlError as error:
        return None, error.found or error.what


def _plain(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate without the list of tensors, which is in merged/merge.json."""
    return {k: v for k, v in certificate.items() if k != "tensors"}


def _training_facts(task: DemoTask, record: Mapping[str, Any]) -> dict[str, Any]:
    seen = record["speed"]["num_examples"]
    return {
        "trainable_params": record["adapter"]["trainable_params"],
        "total_params": record["base"]["num_params"],
        "adapter_bytes": record["adapter"]["bytes"],
        "model_bytes": record["base"]["bytes"],
        "training_tokens_per_s": record["speed"]["tokens_per_s"],
        "training_seconds": record["speed"]["busy_s"],
        "training_examples": record["speed"]["num_examples"],
        "training_answers": round(_num_answers(task.train) * seen / len(task.train)),
    }
