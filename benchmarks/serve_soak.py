"""A soak of `lorakit serve` on loopback: a process of its own, asked by many clients at once.

    python benchmarks/serve_soak.py --minutes 10

Streams, whole answers, streams whose clients go away, bad requests, bursts that fill the queue,
and adapters that are loaded and unloaded all the time. At the end: no good request failed, memory
and file handles are flat, and p50, p95 and p99 of the time to the first token and per token. Exit
code 1 where that is not so. The output file is written every ten seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from lorakit.adapters.attach import attach, detach
from lorakit.adapters.spec import LoraSpec
from lorakit.environment import hardware, versions
from lorakit.files import write_json
from lorakit.formats.peft import save_adapter
from lorakit.models.load import load_model
from serve_rounds import percentiles, pretend_learned

ADMIN = {"Authorization": "Bearer soak-admin"}
BAD: list[tuple[dict[str, Any], int]] = [
    ({"model": "nobody", "prompt": "a"}, 404),
    ({"model": "base", "prompt": "a", "max_tokens": 10**9}, 400),
    ({"model": "base", "prompt": "a", "temperature": "warm"}, 400),
    ({"model": "broken", "prompt": "a"}, 400),
]
# Memory after the first quarter of the time may not grow by more.
MOST_GROWTH = 0.05
MOST_GROWTH_MB = 30.0


@dataclass
class Seen:
    """What has happened."""

    counts: Counter[str] = field(default_factory=Counter[str])
    failures: list[str] = field(default_factory=list[str])
    first_s: list[float] = field(default_factory=list[float])
    token_s: list[float] = field(default_factory=list[float])
    samples: list[dict[str, float]] = field(default_factory=list[dict[str, float]])

    def fail(self, what: str) -> None:
        """Note something that must not be."""
        self.counts["failures"] += 1
        if len(self.failures) < 20:
            self.failures.append(what)


@dataclass(frozen=True)
class Soak:
    """What every client knows."""

    client: httpx.AsyncClient
    seen: Seen
    until: float
    names: tuple[str, ...]
    answer: int

    @property
    def over(self) -> bool:
        """Whether the time is."""
        return time.monotonic() > self.until

    def body(self, drawn: random.Random) -> dict[str, Any]:
        """A good request."""
        words = " ".join(drawn.choices(["tell", "me", "of", "tea", "and", "rain"], k=8))
        asked = {"prompt": words, "max_tokens": drawn.randrange(4, self.answer)}
        adapters = [*self.names, "base"]
        weights = [1 / (rank + 1) for rank in range(len(adapters))]
        return {**asked, "model": drawn.choices(adapters, weights)[0], "ignore_eos": True}


async def stream(soak: Soak, seed: int) -> None:
    """Good streams; one in four is left in the middle."""
    drawn = random.Random(seed)
    while not soak.over:
        leave = drawn.random() < 0.25
        body = {**soak.body(drawn), "stream": True}
        start, times, text, error = time.monotonic(), [], "", ""
        async with soak.client.stream("POST", "/v1/completions", json=body) as answer:
            if await refused(soak, answer):
                continue
            async for line in answer.aiter_lines():
                if '"text":"' in line:
                    times.append(time.monotonic() - start)
                if line.startswith('data: {"error"'):
                    error = line
                text = line or text
                if leave and len(times) > 2:
                    break
        if error:
            soak.seen.fail(f"a stream: {error[:200]}")
        elif leave:
            soak.seen.counts["left"] += 1
        elif text != "data: [DONE]" or not times:
            soak.seen.fail(f"a stream ended with {text[:200]}")
        else:
            soak.seen.counts["streams"] += 1
            soak.seen.first_s.append(times[0])
            # Every answer is as long as was asked: an event may hold several tokens.
            soak.seen.token_s.append((times[-1] - times[0]) / (body["max_tokens"] - 1))


async def whole(soak: Soak, seed: int) -> None:
    """Good requests that wait for the whole answer."""
    drawn = random.Random(seed)
    while not soak.over:
        body = soak.body(drawn)
        answer = await soak.client.post("/v1/completions", json=body)
        if await refused(soak, answer):
            continue
        tokens = answer.json()["usage"]["completion_tokens"]
        if tokens != body["max_tokens"]:
            soak.seen.fail(f"{tokens} of {body['max_tokens']} tokens")
        soak.seen.counts["whole"] += 1


async def bad(soak: Soak, seed: int) -> None:
    """Requests that must be refused, each with its own status."""
    drawn = random.Random(seed)
    while not soak.over:
        body, status = drawn.choice(BAD)
        answer = await soak.client.post("/v1/completions", json=body)
        if answer.status_code not in (status, 429):
            soak.seen.fail(f"{body}: {answer.status_code} instead of {status}: {answer.text[:200]}")
        soak.seen.counts["bad"] += 1
        await asyncio.sleep(0.2)


async def bursts(soak: Soak, seed: int) -> None:
    """More requests at once than the queue takes."""
    drawn = random.Random(seed)
    while not soak.over:
        await asyncio.sleep(5)
        bodies = [{**soak.body(drawn), "max_tokens": 2} for _ in range(64)]
        asked = (soak.client.post("/v1/completions", json=body) for body in bodies)
        for answer in await asyncio.gather(*asked):
            if answer.status_code == 429:
                soak.seen.counts["429"] += 1
                if "retry-after" not in answer.headers:
                    soak.seen.fail("a 429 without Retry-After")
            elif answer.status_code == 200:
                soak.seen.counts["burst"] += 1
            else:
                soak.seen.fail(f"in a burst: {answer.status_code}: {answer.text[:200]}")


async def loads(soak: Soak, seed: int) -> None:
    """Load an adapter under a new name, ask it, unload it."""
    drawn = random.Random(seed)
    number = 0
    while not soak.over:
        number += 1
        name = f"hot-{number}"
        load = {"lora_name": name, "lora_path": drawn.choice(soak.names)}
        answer = await soak.client.post("/v1/load_lora_adapter", json=load, headers=ADMIN)
        if answer.status_code != 200:
            soak.seen.fail(f"a load: {answer.status_code}: {answer.text[:200]}")
            continue
        answer = await soak.client.post(
            "/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 2}
        )
        if not await refused(soak, answer):
            soak.seen.counts["hot"] += 1
        gone = {"lora_name": name}
        answer = await soak.client.post("/v1/unload_lora_adapter", json=gone, headers=ADMIN)
        if answer.status_code != 200:
            soak.seen.fail(f"an unload: {answer.status_code}: {answer.text[:200]}")


async def refused(soak: Soak, answer: httpx.Response) -> bool:
    """Whether a good request was told to come again; anything else but 200 is a failure."""
    if answer.status_code == 200:
        return False
    if answer.status_code == 429:
        soak.seen.counts["429"] += 1
        await asyncio.sleep(0.5)
    else:
        await answer.aread()
        soak.seen.fail(f"a good request: {answer.status_code}: {answer.text[:200]}")
    return True


async def watch(soak: Soak, process: psutil.Process, write: Any) -> None:
    """Memory and file handles of the server, every second; the file every ten."""
    start = time.monotonic()
    while not soak.over:
        sample = {"s": round(time.monotonic() - start, 1), "handles": process.num_fds()}
        soak.seen.samples.append({**sample, "rss_mb": process.memory_info().rss / 1e6})
        if len(soak.seen.samples) % 10 == 0:
            write(soak.seen)
        await asyncio.sleep(1)


async def run(url: str, args: argparse.Namespace, process: psutil.Process, write: Any) -> Seen:
    """All clients until the time is over, then a quiet second."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        names = tuple(f"a{i}" for i in range(args.adapters))
        until = time.monotonic() + 60 * args.minutes
        soak = Soak(client, Seen(), until, names, args.answer)
        tasks = [stream(soak, i) for i in range(args.streams)]
        tasks += [whole(soak, 100), whole(soak, 101), bad(soak, 102), bursts(soak, 103)]
        await asyncio.gather(*tasks, loads(soak, 104), watch(soak, process, write))
    await asyncio.sleep(1)
    soak.seen.samples.append(
        {"s": -1.0, "handles": process.num_fds(), "rss_mb": process.memory_info().rss / 1e6}
    )
    return soak.seen


def verdict(seen: Seen) -> dict[str, Any]:
    """The counts, the percentiles, and what is wrong."""
    wrong = list(seen.failures)
    found: dict[str, Any] = {"counts": dict(seen.counts)}
    for name, values in (("first_token_s", seen.first_s), ("per_token_s", seen.token_s)):
        found[name] = percentiles(values) if values else None
    under_load = [sample for sample in seen.samples if sample["s"] >= 0]
    quarter = under_load[len(under_load) // 4 :]
    if len(quarter) > 3:
        half = len(quarter) // 2
        early, late = quarter[:half], quarter[half:]
        before, after = (max(s["rss_mb"] for s in part) for part in (early, late))
        handles = [max(s["handles"] for s in part) for part in (early, late)]
        found["rss_mb"] = {"early": round(before), "late": round(after)}
        found["handles"] = {"early": handles[0], "late": handles[1], "end": _end(seen)}
        if after - before > max(MOST_GROWTH * before, MOST_GROWTH_MB):
            wrong.append(f"memory grew from {before:.0f} to {after:.0f} MB")
        # Connections come and go; what is open when nobody asks is compared with the first second.
        if _end(seen) > under_load[0]["handles"] + 8:
            wrong.append(f"{_end(seen)} handles are open at the end")
    return {**found, "wrong": wrong}


def _end(seen: Seen) -> int:
    return int(seen.samples[-1]["handles"])


def write_adapters(args: argparse.Namespace, root: Path) -> None:
    """Small adapters over the model, and one that is cut off in the middle."""
    model, _ = load_model(args.model, dtype="float32")
    for i in range(args.adapters):
        attach(model, LoraSpec(r=4 + 4 * (i % 3), alpha=8, targets="all-linear"), name="one")
        pretend_learned(model, i)
        save_adapter(model, root / f"a{i}", name="one")
        detach(model)
    broken = root / "broken"
    broken.mkdir()
    for file in (root / "a0").iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 500 if "safe" in file.name else None])


def main() -> int:
    """Write adapters, start the server, soak it, stop it, and say what was seen."""
    args = _arguments()
    facts = {"benchmark": "serve soak", "model": args.model, "minutes": args.minutes}
    facts |= {"hardware": hardware(), "versions": versions()}

    def write(seen: Seen, **more: Any) -> None:
        write_json(Path(args.output), {**facts, **verdict(seen), **more})

    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        write_adapters(args, Path(directory))
        words = ["serve", "--model", args.model, "--adapters", directory, "--port", "0", "--json"]
        words += ["--max-queue", "32", "--max-batch", "8", "--max-adapters-ram", "4"]
        with (Path(directory) / "log").open("w") as errors:
            server = subprocess.Popen(
                [sys.executable, "-m", "lorakit.cli.main", *words],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "LORAKIT_ADMIN_KEY": "soak-admin"},
            )
            try:
                url = _url(server)
                seen = asyncio.run(run(url, args, psutil.Process(server.pid), write))
            finally:
                server.terminate()
                code = server.wait(60)
    if code != 0:
        seen.fail(f"the server ended with {code}")
    write(seen, finished=True)
    found = verdict(seen)
    print(json.dumps(found, indent=1))
    return 1 if found["wrong"] else 0


def _url(server: subprocess.Popen[str]) -> str:
    text = ""
    for line in server.stdout or ():
        text += line
        if line == "}\n":
            return json.loads(text)["url"]
    raise SystemExit("the server did not start")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--output", default="benchmarks/results/serve_soak.json")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--streams", type=int, default=8, help="clients that stream")
    parser.add_argument("--answer", type=int, default=24, help="tokens of the longest answer")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
