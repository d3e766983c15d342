"""E2E data-to-text with LoRA on SmolLM2: the paper's setting (Table 11), scaled down to a laptop.

The paper adapts q and v of GPT-2 with r=4, alpha=32, AdamW, lr 2e-4, label smoothing 0.1, batch 8,
for 5 epochs of 42,061 rows, and decodes with a beam of 10. Here: SmolLM2-135M-Instruct, the same
adapter, the loss on the completion only, a stated slice of the rows, greedy decoding. Base and
adapter are asked with the same prompt and scored on raw references: corpus BLEU and ROUGE-L as the
official script computes them, and the validation loss on the dev split.

    python benchmarks/e2e.py --data ../shared/data/e2e --output benchmarks/results/e2e.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lorakit as lk
from lorakit.data.sources import load_rows
from lorakit.environment import command_line, hardware, supports_bf16, versions
from lorakit.evaluate.options import EvalOptions
from lorakit.evaluate.run import EvalResult, evaluate
from lorakit.files import write_json
from lorakit.train.config import TrainConfig
from lorakit.train.run import train

MODEL = "smollm2-135m-instruct"
INSTRUCTION = "Write one short text about a restaurant that says exactly this and nothing else.\n"


def main() -> None:
    """Train, evaluate, write the result."""
    args = _arguments()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = _write_splits(args, work)
        result = train(_config(args, work))
        model, tokenizer = lk.load_model(MODEL, dtype=args.dtype)
        lk.load_adapter(model, result.adapter, name="e2e")
        systems = {"base": None, "adapter": "e2e"}
        validation = evaluate(
            model,
            tokenizer,
            load_rows(work / "dev.jsonl"),
            EvalOptions(metrics=("perplexity",), batch_size=32),
            systems=systems,
        )
        test = evaluate(
            model,
            tokenizer,
            load_rows(work / "test.jsonl"),
            EvalOptions(
                metrics=("bleu", "rouge_l"),
                max_new_tokens=80,
                batch_size=32,
                limit=args.test_questions,
            ),
            systems=systems,
        )
        record = result.record
    document = _document(args, rows, validation, test, record)
    document["seconds"] = round(time.monotonic() - started, 1)
    write_json(args.output, document)
    print(json.dumps(document["scores"], indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/e2e"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/e2e.json"))
    parser.add_argument("--train-rows", type=int, default=1200)
    parser.add_argument("--dev-rows", type=int, default=200)
    parser.add_argument("--test-questions", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--dtype",
        default="bfloat16" if supports_bf16() else "float32",
        help="of the base, for training and measuring (default: %(default)s on this machine)",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _config(args: argparse.Namespace, work: Path) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "model": {"ref": MODEL, "dtype": args.dtype, "attention": "eager"},
            "data": {"train": str(work / "train.jsonl")},
            "lora": {"r": 4, "alpha": 32, "targets": "qv"},
            "train": {
                "epochs": 1,
                "batch_size": 8,
                "lr": args.lr,
                "schedule": "linear",
                "warmup_ratio": 0.02,
                "weight_decay": 0.01,
                "label_smoothing": 0.1,
            },
            "output": str(work / "run"),
            "seed": args.seed,
        }
    )


def _write_splits(args: argparse.Namespace, work: Path) -> dict[str, int]:
    """Prompt and completion rows; train and dev are sampled, test keeps all references."""
    shuffled = random.Random(args.seed)
    train_rows = list(_read(args.data / "train.jsonl.gz"))
    dev_rows = list(_read(args.data / "dev.jsonl.gz"))
    splits = {
        "train": shuffled.sample(train_rows, args.train_rows),
        "dev": shuffled.sample(dev_rows, args.dev_rows),
        "test": list(_read(args.data / "test.jsonl.gz")),
    }
    for name, rows in splits.items():
        with (work / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                pair = {"prompt": INSTRUCTION + row["context"], "completion": row["ref"]}
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    return {name: len(rows) for name, rows in splits.items()}


def _read(path: Path) -> Iterable[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _document(
    args: argparse.Namespace,
    rows: dict[str, int],
    validation: EvalResult,
    test: EvalResult,
    record: dict[str, Any],
) -> dict[str, Any]:
    systems = list(test.systems)
    return {
        "benchmark": "e2e",
        "command": command_line(),
        "model": MODEL,
        "setting": {
            "adapter": "LoRA r=4, alpha=32 on q and v",
            "lr": args.lr,
            "dtype": args.dtype,
            "seed": args.seed,
            "loss": "completion only, label smoothing 0.1",
            "rows": rows,
            "test_questions": len(test.questions),
            "references": "raw, all of each meaning representation",
            "decoding": "greedy, at most 80 tokens",
            "prompt": INSTRUCTION + "<context>",
        },
        "scores": {
            name: {
                "validation_loss": math.log(validation.systems[name].scores["perplexity"].value),
                **{m: e.to_json() for m, e in test.systems[name].scores.items()},
            }
            for name in systems
        },
        "differences": test.to_json(max_outputs=0)["differences"],
        "samples": test.to_json(max_outputs=5)["outputs"],
        "training": {k: record[k] for k in ("timing", "speed", "memory")},
        "paper": "Table 3, GPT-2 M LoRA: BLEU 70.4, ROUGE-L 71.8 (tokenised references, 5 epochs "
        "of all rows, beam 10): another model and another budget",
        "hardware": hardware(),
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
