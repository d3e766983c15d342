"""Politeness learned from preferences: what is preferred on held-out pairs, what is said, the cost.

DPO on pairs of a polite and an impolite answer to the same request. Before and after, on pairs that
were not trained on: how often the polite answer is the more likely one (per token, and whole; the
impolite answers are longer), and the greedy answers to some of the requests. Then the speed and the
memory of its steps beside TRL's DPOTrainer (see `preference_speed.py`).

    python benchmarks/preference.py --data pairs.jsonl.gz
    python benchmarks/preference.py --data pairs.jsonl.gz --tiny     random weights: does it run
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lorakit as lk
from lorakit.data.collate import PreferenceCollator
from lorakit.data.preference import PreferenceExamples, build_preferences
from lorakit.data.rows import Rows
from lorakit.data.sft import render_prompt
from lorakit.data.sources import load_rows
from lorakit.environment import command_line, hardware, versions
from lorakit.evaluate.generate import generate_answers
from lorakit.evaluate.intervals import wilson
from lorakit.files import write_json
from lorakit.models.label_head import LabelHead, evaluating
from lorakit.train.config import TrainConfig
from lorakit.train.run import train
from preference_speed import measure_speed, print_speed
from tiny_model import write_tiny
from train_speed import RESULTS

CONFIG = Path(__file__).with_name("preference.yaml")


def main() -> None:
    """Train, measure before and after and beside TRL, write the result."""
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.tiny:
            args.model = str(write_tiny(args.model, work / "model"))
        _write_splits(args, work)
        with contextlib.chdir(work):  # the paths of the config are relative to the rows
            learned = _learn(args)
        _print_learned(learned)
        speed = measure_speed(args, work / "rounds.jsonl") if args.rounds else None
    if speed is not None:
        print_speed(speed)
    document = {
        "benchmark": "preference",
        "measured": not args.tiny,
        "command": command_line(),
        **learned,
        "speed": speed,
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(args.output, document)
    print(f"written to {args.output}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="pairs, .jsonl or .jsonl.gz")
    parser.add_argument("--output", type=Path, default=RESULTS / "preference.json")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pairs", type=int, default=800, help="pairs to train on")
    parser.add_argument("--held-out", type=int, default=100, help="pairs to measure on")
    parser.add_argument("--texts", type=int, default=6, help="requests that are answered")
    parser.add_argument("--tokens", type=int, default=48, help="the longest answer")
    parser.add_argument("--rounds", type=int, default=6, help="steps beside TRL; 0: none")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs of such a step")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbose", action="store_true", help="show what the arms print")
    parser.add_argument("--tiny", action="store_true", help="random weights of few layers")
    parser.add_argument("override", nargs="*", help="key=value, as for lorakit train")
    return parser.parse_args()


def _learn(args: argparse.Namespace) -> dict[str, Any]:
    """Train by the config; the preferences and the texts before and after."""
    config = TrainConfig.from_yaml(CONFIG, [f"model.ref={args.model}", *args.override])
    result = train(config)
    model, tokenizer = lk.load_model(config.model.ref, dtype=config.model.dtype or "float32")
    rows = load_rows("held_out.jsonl")
    lk.load_adapter(model, result.adapter, name="polite")
    systems: dict[str, Any] = {}
    for label, name in (("before", None), ("after", "polite")):
        with lk.use(model, name):
            systems[label] = _system(args, config, rows, (model, tokenizer))
    return {
        "config": config.to_dict(),
        "requests": list(rows)[: args.texts],
        "systems": systems,
        "training": {
            "timing": result.record["timing"],
            "final": result.record["metrics"]["final"],
        },
    }


def _system(
    args: argparse.Namespace,
    config: TrainConfig,
    rows: Rows,
    of: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> dict[str, Any]:
    model, tokenizer = of
    held_out = build_preferences(rows, tokenizer, config.data, paired=True)
    prompts = [render_prompt(row, tokenizer, config.data) for row in list(rows)[: args.texts]]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=args.tokens)
    preferred = _preferred(model, tokenizer, held_out)
    return {**preferred, "texts": [answer.text for answer in answers]}


def _print_learned(learned: dict[str, Any]) -> None:
    for label, found in learned["systems"].items():
        print(f"{label}: the polite answer is preferred in {found['wins']} of {found['pairs']}")
        for row, text in zip(learned["requests"], found["texts"], strict=True):
            print(f"  {row['instruction']} {row['input']}\n    {text}")


def _write_splits(args: argparse.Namespace, work: Path) -> None:
    opened = gzip.open if args.data.suffix == ".gz" else open
    with opened(args.data, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    random.Random(0).shuffle(rows)
    held, trained = rows[: args.held_out], rows[args.held_out : args.held_out + args.pairs]
    # As many as the rounds need; the same pairs for every arm, seen before or not.
    timed = [rows[i % len(rows)] for i in range(args.rounds * args.batch_size)]
    for name, chosen in (("held_out", held), ("train", trained), ("rounds", timed)):
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (work / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _preferred(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: PreferenceExamples
) -> dict[str, Any]:
    """How often the chosen answer is the more likely one."""
    pad = tokenizer.pad_token_id
    collate = PreferenceCollator(pad if isinstance(pad, int) else 0, mismatched=False)
    head = LabelHead(model)
    whole: list[bool] = []
    per_token: list[bool] = []
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(examples), 8):
            batch = collate(examples[start : start + 8])
            del batch["desirable"]
            batch = {name: value.to(model.device) for name, value in batch.items()}
            logps = -head.logits(batch).row_nll(len(batch["labels"]))
            means = logps / (batch["labels"][:, 1:] >= 0).sum(1)
            for found, values in ((whole, logps), (per_token, means)):
                chosen, rejected = values.chunk(2)
                found += (chosen > rejected).tolist()
    return {
        "pairs": len(examples),
        "wins": sum(per_token),
        "wins_of_whole_answers": sum(whole),
        "share": wilson(sum(per_token), len(per_token)).to_json(),
    }


if __name__ == "__main__":
    main()
