"""Politeness learned from preferences: what is preferred on held-out pairs, and what is said.

DPO on pairs of a polite and an impolite answer to the same request. Before and after, on pairs that
were not trained on: how often the polite answer is the more likely one (whole, and per token, since
impolite answers are longer), and the greedy answers to some of the requests.

    python benchmarks/preference.py --data pairs.jsonl.gz --output preference.json
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lorakit as lk
from lorakit.data.collate import PreferenceCollator
from lorakit.data.preference import PreferenceExamples, build_preferences
from lorakit.data.sft import render_prompt
from lorakit.data.sources import load_rows
from lorakit.environment import hardware, versions
from lorakit.evaluate.generate import generate_answers
from lorakit.evaluate.intervals import wilson
from lorakit.files import write_json
from lorakit.models.label_head import LabelHead, evaluating
from lorakit.train.config import TrainConfig
from lorakit.train.run import train

CONFIG = Path(__file__).with_name("preference.yaml")


def main() -> None:
    """Train, measure before and after, write the result."""
    args = _arguments()
    started = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        _write_splits(args, Path(folder))
        # The paths of the config are relative to the rows.
        os.chdir(folder)
        stack.callback(os.chdir, started)
        config = TrainConfig.from_yaml(CONFIG, args.override)
        result = train(config)
        model, tokenizer = lk.load_model(config.model.ref, dtype=config.model.dtype or "float32")
        rows = load_rows("held_out.jsonl")
        held_out = build_preferences(rows, tokenizer, config.data, paired=True)
        asked = list(rows)[: args.texts]
        lk.load_adapter(model, result.adapter, name="polite")
        systems: dict[str, Any] = {}
        for label, name in (("before", None), ("after", "polite")):
            with lk.use(model, name):
                systems[label] = _preferred(model, tokenizer, held_out)
                prompts = [render_prompt(row, tokenizer, config.data) for row in asked]
                answers = generate_answers(model, tokenizer, prompts, max_new_tokens=args.tokens)
                systems[label]["texts"] = [answer.text for answer in answers]
        record = result.record
    document = {
        "command": shlex.join(["python", "benchmarks/preference.py", *sys.argv[1:]]),
        "config": config.to_dict(),
        "requests": asked,
        "systems": systems,
        "training": {"timing": record["timing"], "final": record.get("final")},
        "hardware": hardware(),
        "versions": versions(),
    }
    if args.output is not None:
        write_json(args.output, document)
    for label, found in systems.items():
        print(f"{label}: the polite answer is preferred in {found['wins']} of {found['pairs']}")
        for row, text in zip(asked, found["texts"], strict=True):
            print(f"  {row['instruction']} {row['input']}\n    {text}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="pairs, .jsonl or .jsonl.gz")
    parser.add_argument("--output", type=Path, help="where the result goes, JSON")
    parser.add_argument("--pairs", type=int, default=400, help="pairs to train on")
    parser.add_argument("--held-out", type=int, default=100, help="pairs to measure on")
    parser.add_argument("--texts", type=int, default=6, help="requests that are answered")
    parser.add_argument("--tokens", type=int, default=48, help="the longest answer")
    parser.add_argument("override", nargs="*", help="key=value, as for lorakit train")
    return parser.parse_args()


def _write_splits(args: argparse.Namespace, work: Path) -> None:
    opened = gzip.open if args.data.suffix == ".gz" else open
    with opened(args.data, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    random.Random(0).shuffle(rows)
    held, trained = rows[: args.held_out], rows[args.held_out : args.held_out + args.pairs]
    for name, chosen in (("held_out", held), ("train", trained)):
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
