"""The preference benchmark at a tiny size: it trains, measures both sides, writes the result."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

import tiny_runs

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def test_it_measures_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tiny_runs.write_model(tmp_path / "model")
    rows = [
        {
            "instruction": f"w{i} w{i + 1}",
            "input": "",
            "chosen": "w1 w2",
            "rejected": f"w{i % 5 + 3} w9 w9",
        }
        for i in range(24)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "pairs.jsonl").write_text(text)
    output = tmp_path / "result.json"
    sizes = ["--pairs", "16", "--held-out", "8", "--texts", "2", "--tokens", "4"]
    overrides = ["max_steps=6", "lr=0.02"]
    files = ["--data", str(tmp_path / "pairs.jsonl"), "--output", str(output)]
    files += ["--model", str(tmp_path / "model"), "--rounds", "0"]
    monkeypatch.setattr(sys, "argv", ["preference.py", *files, *sizes, *overrides])
    sys.modules.pop("preference", None)
    importlib.import_module("preference").main()
    found = json.loads(output.read_text())
    before, after = found["systems"]["before"], found["systems"]["after"]
    assert before["pairs"] == after["pairs"] == 8
    assert after["wins"] > before["wins"] or after["wins"] == 8
    assert len(after["texts"]) == 2
