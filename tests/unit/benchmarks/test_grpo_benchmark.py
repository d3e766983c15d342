"""The GRPO benchmark at a tiny size: it teaches, reinforces, measures, writes the result."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import tiny_runs

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_it_measures_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tiny_runs.write_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = tiny_runs.TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    output = tmp_path / "result.json"
    files = ["--model", str(tmp_path / "model"), "--output", str(output), "--threads", "1"]
    tiny = ["--tiny", "grpo.num_samples=2", "grpo.max_new_tokens=5"]
    monkeypatch.setattr(sys, "argv", ["grpo_sql.py", *files, *tiny])
    sys.modules.pop("grpo_sql", None)
    importlib.import_module("grpo_sql").main()
    found = json.loads(output.read_text())
    assert not found["measured"]
    assert set(found["accuracy"]) == {"held_out", "held_back"}
    assert found["accuracy"]["held_back"]["after"]["n"] == 6
    assert found["training"]["num_steps"] == 2
    assert len(found["training"]["curve"]) == 2
    assert found["training"]["sampled_tokens_per_s"] > 0
