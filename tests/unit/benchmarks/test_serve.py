"""The benchmark and the soak of serving: their arithmetic, and both at a tiny size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import tiny_server

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def imported(name: str) -> ModuleType:
        sys.modules.pop(name, None)
        return __import__(name)

    return imported


def test_rounds_end_before_the_time_does(script) -> None:
    rounds = script("serve_rounds")
    until = time.monotonic() + 0.3
    bench = rounds.Bench(None, None, until, 0, (1,), 1, 4)
    seen = [time.sleep(0.1) for _ in bench.rounds(at_least=1, at_most=100)]
    assert 1 <= len(seen) <= 3
    assert time.monotonic() < until + 0.05
    # Too little time for anything: what must be done is done.
    late = rounds.Bench(None, None, until - 100, 0, (1,), 1, 4)
    assert list(late.rounds(at_least=2, at_most=5)) == [0, 1]
    assert rounds.ratios([2.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == {
        "median": 3.0,
        "n": 3,
        "quartiles": [2.5, 3.5],
    }


def test_the_soak_says_what_is_wrong(script) -> None:
    soak = script("serve_soak")
    flat = [{"s": float(i), "rss_mb": 500.0 + i % 3, "handles": 40} for i in range(40)]
    end = {"s": -1.0, "rss_mb": 500.0, "handles": 40}
    assert soak.verdict(soak.Seen(samples=[*flat, end]))["wrong"] == []
    growing = [{**sample, "rss_mb": 500.0 + 5 * i} for i, sample in enumerate(flat)]
    (wrong,) = soak.verdict(soak.Seen(samples=[*growing, end]))["wrong"]
    assert "memory grew" in wrong
    (wrong,) = soak.verdict(soak.Seen(samples=[*flat, {**end, "handles": 90}]))["wrong"]
    assert "handles" in wrong
    seen = soak.Seen(samples=[*flat, end], first_s=[0.1, 0.2, 0.3])
    seen.fail("a good request: 500")
    found = soak.verdict(seen)
    assert found["wrong"] == ["a good request: 500"]
    assert found["first_token_s"]["p50"] == 0.2


def ran(name: str, *words: str) -> dict[str, object]:
    """A script in a process of its own; what it wrote."""
    output = words[words.index("--output") + 1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *words],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(Path(output).read_text())


@pytest.mark.slow
def test_the_benchmark_at_a_tiny_size(tmp_path: Path) -> None:
    base, output = tiny_server.write_base(tmp_path / "tiny"), str(tmp_path / "serve.json")
    words = ["--model", str(base), "--minutes", "0.2", "--requests", "6", "--answer", "12"]
    words += ["--adapters", "1", "4", "9", "--output", output]
    first = ran("serve.py", *words, "--only", "registered,static")
    assert set(first) >= {"registered", "static", "hardware"}
    found = ran("serve.py", *words, "--only", "decode,prefill")
    assert set(found) >= {"decode", "prefill", "registered", "static"}
    assert found["decode"]["adapters"]["over_base"]["median"] > 0  # type: ignore[index]
    assert set(found["registered"]["counts"]) == {"1", "4", "9"}  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.real
def test_llama_cpp_answers_the_same_streams(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    words = ["--only", "llama", "--minutes", "0.1", "--answer", "8"]
    found = ran("serve.py", *words, "--output", str(tmp_path / "serve.json"))["llama"]
    assert isinstance(found, dict)
    for load in ("one stream", "16 streams, 16 adapters"):
        assert set(found[load]) == {"lorakit", "llama.cpp Q4_1", "llama.cpp float32"}
        assert found[load]["llama.cpp float32"]["lorakit_over_this"]["median"] > 0


@pytest.mark.slow
def test_the_soak_at_a_tiny_size(tmp_path: Path) -> None:
    base, output = tiny_server.write_base(tmp_path / "tiny"), str(tmp_path / "soak.json")
    found = ran("serve_soak.py", "--model", str(base), "--minutes", "0.25", "--output", output)
    assert found["wrong"] == []
    counts = found["counts"]
    assert isinstance(counts, dict)
    assert min(counts[n] for n in ("streams", "whole", "left", "bad", "429", "hot")) > 0
