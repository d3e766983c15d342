"""What it costs to serve many adapters over one base, as ratios within one run.

    python benchmarks/serve.py
    python benchmarks/serve.py --only decode,prefill --minutes 3

decode      one step of 8 rows with 8 different adapters against the base's step, and PEFT's
            `adapter_names` against the same base under transformers.
prefill     the same for 8 prompts of 64 tokens.
registered  one queue of requests over 1, 8, 64 and 512 registered adapters, drawn by Zipf's law,
            and how long a list of 1,000 adapters takes.
static      32 requests of mixed lengths against transformers' `generate` in static batches.
llama       one stream, and 16 streams of 16 adapters, against llama.cpp over the same GGUF file.

A section goes round and round, everything it compares once per round in an order of its own, until
its share of --minutes is over; a ratio is taken within its round. The output file is written after
every round, beside what it has of other sections.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lorakit.environment import command_line, hardware, versions
from lorakit.files import write_json
from lorakit.models.load import load_model
from serve_llama import llama_section
from serve_queue import registered_section, static_section
from serve_rounds import Bench
from serve_step import decode_section, prefill_section

# Section -> what it does, and its share of the time.
SECTIONS: dict[str, tuple[Callable[[Bench], Iterator[dict[str, Any]]], float]] = {
    "decode": (decode_section, 0.12),
    "prefill": (prefill_section, 0.12),
    "registered": (registered_section, 0.33),
    "static": (static_section, 0.23),
    "llama": (llama_section, 0.2),
}


def main() -> None:
    """Run the sections one after the other, each within its share of what time is left."""
    args = _arguments()
    end = time.monotonic() + 60 * args.minutes
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model, dtype="float32")
    left = list(args.only)
    while left:
        name = left[0]
        section, share = SECTIONS[name]
        share /= sum(SECTIONS[other][1] for other in left)
        start = time.monotonic()
        bench = Bench(
            model=model,
            tokenizer=tokenizer,
            until=start + share * (end - start),
            seed=args.seed,
            counts=tuple(args.adapters),
            requests=args.requests,
            answer=args.answer,
            reference=args.model,
        )
        for found in section(bench):
            _write(args, name, {**found, "seconds": round(time.monotonic() - start, 1)})
            print(json.dumps({name: found}), flush=True)
        left.pop(0)


def _write(args: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """Put one section's result of now beside the others."""
    path = Path(args.output)
    before = json.loads(path.read_text()) if path.is_file() else {}
    section = {
        "command": command_line(),
        "model": args.model,
        "threads": torch.get_num_threads(),
        **found,
    }
    facts = {"benchmark": "serve", "hardware": hardware(), "versions": versions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**before, **facts, name: section})


def _sections(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"sections are {', '.join(SECTIONS)}, not {text!r}")
    return list(dict.fromkeys(names))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--output", default="benchmarks/results/serve.json")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all sections together")
    parser.add_argument(
        "--only", type=_sections, default=list(SECTIONS), metavar="A,B", help="by default all"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--requests", type=int, default=24, help="registered: requests per queue")
    parser.add_argument("--answer", type=int, default=48, help="tokens of the longest answer")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
