"""Training speed and memory against PEFT and TRL: one process per arm, interleaved steps.

Real E2E rows on SmolLM2-135M-Instruct, LoRA r=8 on all linear layers, batch 16, float32, as many
threads as asked for. Every arm trains the same rows of the same tokens in its own trainer; a round
is one optimizer step of each arm, and an epoch is as many rounds as there are batches, so that all
arms have done the same rows however they are ordered. Before that, and to warm up, every arm gets
the same factors and the same batches and must find the same losses.

    python benchmarks/train_speed.py --data DIR              the peers, and full fine-tuning
    python benchmarks/train_speed.py --data DIR --profile    the floor, and where the time goes

DIR holds train.jsonl.gz of the E2E data set (columns context and ref).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import train_arms
from lorakit.environment import command_line, hardware, versions
from lorakit.files import write_json, write_text
from train_worker import Worker

INSTRUCTION = "Write one short text about a restaurant that says exactly this and nothing else.\n"
RESULTS = Path(__file__).parent / "results"
PEERS = ("peft", "trl", "trl-best", "lorakit", "lorakit-full")
TOLERANCE = 1e-4


def main() -> None:
    """Measure what is asked for, print the table, write the result."""
    args = _arguments()
    arms = args.arms or list(PEERS)
    with tempfile.TemporaryDirectory() as folder:
        rows = _write_rows(args, Path(folder))
        if args.profile:
            _profile(args, rows)
            return
        workers = {name: _start(args, name, rows) for name in arms}
        try:
            document = _measure(args, workers)
        finally:
            for worker in workers.values():
                worker.stop()
    document["command"] = command_line()
    _print(document)
    _append(args.output, document)
    print(f"written to {args.output}")


def _start(args: argparse.Namespace, name: str, rows: Path) -> Worker:
    setting = {
        "arm": name,
        "rows": str(rows),
        "batch_size": args.batch_size,
        "threads": args.threads,
        "precision": args.precision,
        "seed": args.seed,
        "model": args.model,
        "verbose": args.verbose,
        "huge_pages": train_arms.has_huge_pages(name),
        "checks": name != "lorakit-full",
    }
    print(f"starting {name}: {train_arms.describe(name)}", flush=True)
    return Worker(setting)


def _measure(args: argparse.Namespace, workers: dict[str, Worker]) -> dict[str, Any]:
    facts = {name: worker.read() for name, worker in workers.items()}
    _require_equal_losses(args, facts)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    order = random.Random(args.seed)
    for number in range(args.steps):
        for name in order.sample(list(workers), len(workers)):
            steps[name].append(workers[name].step())
        shown = ", ".join(f"{n} {s[-1]['seconds']:.1f} s" for n, s in steps.items())
        print(f"round {number + 1} of {args.steps}: {shown}", flush=True)
    arms = {}
    for name, worker in workers.items():
        ended = worker.finish()
        arms[name] = _summary(name, steps[name], {**facts[name], **ended})
    reference = "peft" if "peft" in arms else next(iter(arms))
    for name, arm in arms.items():
        arm["ratio"] = speed_ratio(steps[name], steps[reference], args.seed)
        arm["memory_ratio"] = arm["memory_above_base_bytes"] / max(
            1, arms[reference]["memory_above_base_bytes"]
        )
    return {
        "benchmark": "train_speed",
        "reference": reference,
        "setting": {
            "model": args.model,
            "adapter": "LoRA r=8, alpha=16, all linear layers, no dropout",
            "data": "E2E train, instruction and context as a chat, loss on the answer",
            "batch_size": args.batch_size,
            "rows": args.batch_size * args.steps,
            "precision": args.precision,
            "threads": args.threads,
            "steps": args.steps,
            "seed": args.seed,
        },
        "arms": arms,
        "hardware": hardware(),
        "versions": {**versions(), **train_arms.peer_versions()},
    }


def _require_equal_losses(args: argparse.Namespace, facts: dict[str, dict[str, Any]]) -> None:
    """All arms on the same batches with the same factors: to 1e-4 in float32."""
    known = {name: fact["losses"] for name, fact in facts.items() if fact["losses"]}
    first = next(iter(known.values()), [])
    tolerance = TOLERANCE if args.precision == "fp32" else 0.03
    for name, losses in known.items():
        worst = max((abs(a - b) for a, b in zip(losses, first, strict=True)), default=0.0)
        print(f"losses of {name}: {losses} (differ by at most {worst:.1e})", flush=True)
        if worst > tolerance:
            raise SystemExit(f"{name} computes another loss: it differs by {worst:.3g}")


def _summary(name: str, steps: list[dict[str, float]], facts: dict[str, Any]) -> dict[str, Any]:
    seconds = sum(step["seconds"] for step in steps)
    return {
        "what": train_arms.describe(name),
        "examples_per_s": round(sum(s["rows"] for s in steps) / seconds, 4),
        "tokens_per_s": round(sum(s["tokens"] for s in steps) / seconds, 1),
        "step_s": [round(s["seconds"], 3) for s in steps],
        "memory_above_base_bytes": facts["peak_bytes"] - facts["base_bytes"],
        "base_bytes": facts["base_bytes"],
        "losses": facts["losses"],
    }


def speed_ratio(
    mine: list[dict[str, float]], theirs: list[dict[str, float]], seed: int
) -> dict[str, float]:
    """Examples/s of one arm over another's, with the 95 % interval over resampled rounds."""
    draws = random.Random(seed)

    def of(rounds: list[int]) -> float:
        speeds = [
            sum(s[i]["rows"] for i in rounds) / sum(s[i]["seconds"] for i in rounds)
            for s in (mine, theirs)
        ]
        return speeds[0] / speeds[1]

    every = list(range(len(mine)))
    spread = sorted(of(draws.choices(every, k=len(every))) for _ in range(2000))
    per_round = [of([i]) for i in every]
    return {
        "value": round(of(every), 3),
        "low": round(spread[49], 3),
        "high": round(spread[1949], 3),
        "median_round": round(statistics.median(per_round), 3),
    }


def _print(document: dict[str, Any]) -> None:
    machine = document["hardware"]
    print(f"\n{machine['cpu']}, {document['setting']['threads']} threads; {document['setting']}")
    print(f"{'':<24}{'examples/s':>11}{'tokens/s':>10}{'ratio':>7}{'95 %':>16}{'memory':>10}")
    for name, arm in document["arms"].items():
        ratio, memory = arm["ratio"], arm["memory_above_base_bytes"] / 2**20
        interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        print(
            f"{name:<24}{arm['examples_per_s']:>11.3f}{arm['tokens_per_s']:>10.1f}"
            f"{ratio['value']:>7.2f}{interval:>16}{memory:>6.0f} MiB"
        )


def _append(path: Path, document: dict[str, Any]) -> None:
    """One file holds the newest run of each precision and seed.

    Arms that were measured in several commands (each against its own reference) come together.
    """
    known = json.loads(path.read_text()) if path.exists() else {"benchmark": "train_speed"}
    runs = known.setdefault("runs", {})
    name = f"{document['setting']['precision']}-seed-{document['setting']['seed']}"
    earlier = runs.get(name, {})
    if earlier.get("setting") == document["setting"]:
        document = {**document, "arms": {**earlier["arms"], **document["arms"]}}
    runs[name] = document
    write_json(path, known)


def _profile(args: argparse.Namespace, rows: Path) -> None:
    worker = _start(args, "lorakit-profiled", rows)
    worker.read()
    for _ in range(2):
        worker.step()
    found = worker.finish()
    write_text(args.profile, found["profile"])
    print(found["profile"])


def _write_rows(args: argparse.Namespace, folder: Path) -> Path:
    """Rows for all steps of an arm, prompt and completion."""
    with gzip.open(args.data / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chosen = random.Random(args.seed).sample(rows, args.batch_size * args.steps)
    path = folder / "rows.jsonl"
    lines = [
        json.dumps({"prompt": INSTRUCTION + row["context"], "completion": row["ref"]})
        for row in chosen
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of the E2E data set")
    parser.add_argument("--output", type=Path, default=RESULTS / "train_speed.json")
    parser.add_argument("--arms", nargs="+", help="these arms only")
    parser.add_argument(
        "--profile",
        type=Path,
        nargs="?",
        const=RESULTS / "train_speed_profile.txt",
        help="count the floor and profile a step, into this file",
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="rounds, an epoch")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="show what the arms print")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
