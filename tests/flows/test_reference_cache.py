"""The reference's log-probabilities are computed once, and only for what they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_runs
from lorakit.errors import LorakitWarning
from lorakit.methods.lora import LoraMethod
from lorakit.train.config import TrainConfig
from lorakit.train.run import train


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    tiny_runs.write_model(tmp_path / "model")
    for name, count in (("train", 11), ("validation", 5)):
        rows = [
            {
                "prompt": " ".join(f"w{i + j}" for j in range(i % 4 + 1)),
                "chosen": " w1" * (i % 5 + 1),
                "rejected": " w2 w3" * (i % 3 + 1),
            }
            for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def _config(directory: Path, output: str, *, cache: bool = True, beta: float = 0.3) -> TrainConfig:
    values = tiny_runs.values(directory, output, lr=0.02, batch_size=4, epochs=2, eval_every=2)
    preference = {"beta": beta, "cache_reference": cache}
    return TrainConfig.from_dict({**values, "task": "dpo", "preference": preference})


def _lines(config: TrainConfig) -> list[dict[str, Any]]:
    run = train(config, say=lambda _line: None).directory
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "eval_loss", "eval_reward_margin")
    return [{key: line[key] for key in kept if key in line} for line in lines]


def test_it_is_computed_once_and_changes_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    plain = _lines(_config(directory, "plain", cache=False))
    assert not (directory / "cache" / "references").exists()
    calls: list[int] = []
    disabled = LoraMethod.disabled
    monkeypatch.setattr(
        LoraMethod, "disabled", lambda self, model: calls.append(1) or disabled(self, model)
    )
    first = _lines(_config(directory, "first"))
    assert len(calls) == 3 + 2  # batches of 11 and of 5 pairs
    for mine, theirs in zip(first, plain, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    files = sorted((directory / "cache" / "references").iterdir())
    assert [file.suffix for file in files] == [".safetensors"] * 2

    # Another beta, the same tokens: nothing is computed again.
    _lines(_config(directory, "second", beta=0.9))
    assert len(calls) == 5
    # Rows that changed are other rows; the held-out ones are still known.
    rows = (directory / "train.jsonl").read_text()
    (directory / "train.jsonl").write_text(rows.replace("w2 w3", "w2 w4", 1))
    _lines(_config(directory, "third"))
    assert len(calls) == 5 + 3
    # Another base.
    tiny_runs.write_model(directory / "model", seed=12)
    _lines(_config(directory, "fourth"))
    assert len(calls) == 5 + 3 + 5
    assert len(list((directory / "cache" / "references").iterdir())) == 2 + 1 + 2


def test_a_damaged_file_is_computed_again(directory: Path) -> None:
    first = _lines(_config(directory, "one"))
    for file in (directory / "cache" / "references").iterdir():
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.warns(LorakitWarning, match="damaged and computed again"):
        again = _lines(_config(directory, "two"))
    assert again == first
    assert _lines(_config(directory, "three")) == first
