"""Reinforcement learning on the demo's SQL: what execution as a reward adds to fine-tuning.

SmolLM2 learns the demo's task as `lorakit demo` does, for a stated time, or an adapter of a demo is
taken. Then GRPO samples answers to fresh questions about the training schemas and learns from
whether each query returns the right rows. Before and after, execution accuracy of greedy answers on
the demo's held-out questions (schemas never trained on) and on held-back questions about the
training schemas, both paired.

    python benchmarks/grpo_sql.py
    python benchmarks/grpo_sql.py --adapter runs/demo/adapter --minutes 20
    python benchmarks/grpo_sql.py --tiny     random weights, few questions: does it run
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lorakit as lk
from lorakit.data.sources import load_rows
from lorakit.demo.database import write_database
from lorakit.demo.questions import Question, conversations, make_questions
from lorakit.demo.run import write_rows
from lorakit.demo.tasks import build_task
from lorakit.environment import command_line, hardware, supports_bf16, versions
from lorakit.evaluate.options import EvalOptions
from lorakit.evaluate.run import EvalResult, evaluate
from lorakit.files import write_json
from lorakit.train.config import TrainConfig
from lorakit.train.run import TrainResult, train
from tiny_model import write_tiny
from train_speed import RESULTS

CONFIG = Path(__file__).with_name("grpo_sql.yaml")
METRIC = "sql_execution"
# Between the seeds of the demo's questions and of those that are asked and held back here.
_FRESH_SEED = 1_000
_CURVE_POINTS = 20


def main() -> None:
    """Fine-tune, reinforce, measure both, write the result."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    adapter = None if args.adapter is None else args.adapter.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if args.tiny:
            args.model = str(write_tiny(args.model, Path("model")))
        _write_data(args)
        sft = None
        if adapter is None:
            sft = train(_sft_config(args))
            adapter = sft.adapter
        result = train(_grpo_config(args, adapter))
        found = _measure(args, {"before": adapter, "after": result.adapter})
        facts = _training(result)
    document = {
        "benchmark": "grpo_sql",
        "measured": not args.tiny,
        "command": command_line({"--adapter": "DIR", "--output": "FILE"}),
        "model": "random" if args.tiny else args.model,
        "adapter": "given" if sft is None else _seconds(sft),
        "config": result.record["config"],
        "accuracy": found,
        "training": facts,
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(args.output, document)
    _print(document)
    print(f"written to {args.output}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "grpo_sql.json")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--adapter", type=Path, help="of an earlier demo; else one is trained")
    parser.add_argument("--sft-minutes", type=float, default=7.0, help="of fine-tuning")
    parser.add_argument("--minutes", type=float, default=20.0, help="of reinforcement")
    parser.add_argument("--prompts", type=int, default=1600, help="fresh questions to learn from")
    parser.add_argument("--held-back", type=int, default=400, help="questions to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tiny", action="store_true", help="random weights, few questions")
    parser.add_argument("override", nargs="*", help="key=value of the reinforcement's config")
    args = parser.parse_args()
    args.output = args.output.resolve()
    if args.tiny:
        args.prompts, args.held_back = min(args.prompts, 12), min(args.held_back, 6)
    return args


def _write_data(args: argparse.Namespace) -> None:
    """sft.jsonl, grpo.jsonl, held_back.jsonl and held_out.jsonl with their databases, in data/."""
    data = Path("data")
    data.mkdir()
    sft, held_out, known = _demo_rows(args)
    wanted = args.prompts + args.held_back
    fresh = _fresh(wanted, known, args.seed + _FRESH_SEED)
    splits = {
        "sft": sft,
        "grpo": [question.to_row() for question in fresh[: args.prompts]],
        "held_back": [question.to_row() for question in fresh[args.prompts :]],
        "held_out": held_out,
    }
    for name, rows in splits.items():
        write_rows(data / f"{name}.jsonl", rows)
    asked = [*splits["grpo"], *splits["held_back"], *splits["held_out"]]
    for name in sorted({row["domain"] for row in asked}):
        write_database(name, data / f"{name}.sqlite")


def _demo_rows(args: argparse.Namespace) -> tuple[list[Any], list[Any], set[tuple[str, str]]]:
    """The demo's rows to learn, its held-out ones, and the questions among the former."""
    if args.tiny:
        sft = conversations(make_questions("train", 24, args.seed), 4)
        held_out = [q.to_row() for q in make_questions("held_out", 6, args.seed)]
    else:
        task = build_task("sql", args.seed)
        sft, held_out = task.train, task.held_out
    said = [
        (row["domain"], turn["content"].rsplit("\n", 1)[-1])
        for row in sft
        for turn in row["messages"]
        if turn["role"] == "user"
    ]
    return sft, held_out, set(said)


def _fresh(num: int, known: set[tuple[str, str]], seed: int) -> list[Question]:
    """Questions about the training schemas that are not among the known ones."""
    drawn = make_questions("train", num + num // 4 + 8, seed)
    fresh = [q for q in drawn if (q.domain, q.question) not in known]
    if len(fresh) < num:
        raise SystemExit(f"only {len(fresh)} fresh questions of {num}")
    return fresh[:num]


def _dtype() -> str | None:
    """As the demo: bfloat16 where the processor multiplies it in hardware."""
    return "bfloat16" if supports_bf16() else None


def _sft_config(args: argparse.Namespace) -> TrainConfig:
    task = build_task("sql", args.seed) if not args.tiny else None
    length = {"max_minutes": args.sft_minutes} if task is not None else {"max_steps": 2}
    return TrainConfig.from_dict(
        {
            "model": {"ref": args.model, "dtype": _dtype(), "attention": "grouped"},
            "data": {"train": "data/sft.jsonl"},
            "lora": dict(task.lora) if task is not None else {"r": 4, "targets": "all-linear"},
            "train": {**(task.training if task is not None else {}), **length},
            "output": "sft-run",
            "seed": args.seed,
        }
    )


def _grpo_config(args: argparse.Namespace, adapter: Path) -> TrainConfig:
    length = [f"max_minutes={args.minutes}"]
    if args.tiny:
        length = ["train.epochs=null", "max_steps=2", "batch_size=2"]
    given = [f"model.ref={args.model}", f"continue_from={adapter}", f"seed={args.seed}"]
    dtype = _dtype()
    if dtype is not None:
        given.append(f"model.dtype={dtype}")
    return TrainConfig.from_yaml(CONFIG, [*given, *length, *args.override])


def _measure(args: argparse.Namespace, adapters: dict[str, Path]) -> dict[str, Any]:
    """Execution accuracy of both adapters on both sets of questions, greedy answers."""
    model, tokenizer = lk.load_model(args.model, dtype=_dtype())
    for name, path in adapters.items():
        lk.load_adapter(model, path, name=name)
    options = EvalOptions(metrics=(METRIC,), max_new_tokens=48, batch_size=80)
    systems: dict[str, Any] = {name: name for name in adapters}
    found: dict[str, Any] = {}
    for split in ("held_out", "held_back"):
        rows = load_rows(f"data/{split}.jsonl")
        found[split] = _scores(evaluate(model, tokenizer, rows, options, systems=systems))
    return found


def _scores(result: EvalResult) -> dict[str, Any]:
    scores = {name: found.scores[METRIC].to_json() for name, found in result.systems.items()}
    return {**scores, "difference": result.differences["after"][METRIC].to_json()}


def _training(result: TrainResult) -> dict[str, Any]:
    lines = [json.loads(n) for n in (result.directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward" in line]
    sample_s = sum(line["sample_s"] for line in steps)
    learn_s = sum(line["step_s"] for line in steps) - sample_s
    width = max(1, -(-len(steps) // _CURVE_POINTS))
    blocks = [steps[start : start + width] for start in range(0, len(steps), width)]
    return {
        "num_steps": len(steps),
        "seconds": round(sample_s + learn_s, 1),
        "sample_s": round(sample_s, 1),
        "learn_s": round(learn_s, 1),
        "sampled_tokens_per_s": sum(n["sampled_tokens"] for n in steps) / max(sample_s, 1e-9),
        "learned_tokens_per_s": sum(n["learned_tokens"] for n in steps) / max(learn_s, 1e-9),
        "curve": [
            {"step": block[-1]["step"]}
            | {key: _mean(block, key) for key in ("reward", "no_signal", "truncated")}
            for block in blocks
        ],
    }


def _mean(lines: Sequence[dict[str, Any]], key: str) -> float:
    return sum(line[key] for line in lines) / len(lines)


def _seconds(result: TrainResult) -> dict[str, Any]:
    return {"training_s": result.record["speed"]["busy_s"]}


def _print(document: dict[str, Any]) -> None:
    for split, found in document["accuracy"].items():
        before, after = (found[name]["value"] for name in ("before", "after"))
        difference = found["difference"]
        print(f"{split}: {before:.1%} -> {after:.1%}  {json.dumps(difference)}")
    facts = document["training"]
    print(
        f"{facts['num_steps']} steps, {facts['sampled_tokens_per_s']:.0f} tokens/s sampled, "
        f"{facts['learned_tokens_per_s']:.0f} learned"
    )
    print("reward", " ".join(f"{point['reward']:.2f}" for point in facts["curve"]))


if __name__ == "__main__":
    main()
