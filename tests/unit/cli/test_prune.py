"""`lorakit prune` measures as the adapter was trained, and what it is told to measure."""

from __future__ import annotations

import json

import pytest

from lorakit.cli.main import main


@pytest.fixture
def asked(base, tmp_path):
    """An adapter trained without the chat template, on columns of other names; and its rows."""
    rows = [{"q": f"{a}+{b}", "a": str(a + b)} for a in range(4) for b in range(3)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{ref: {base}}}\noutput: {tmp_path / 'run'}\n"
        f"data: {{train: {data}, template: none, columns: {{prompt: q, completion: a}}}}\n"
    )
    words = ["lora.r=3", "train.epochs=1", "train.batch_size=4", "train.lr=0.01"]
    assert main(["train", str(config), *words]) == 0
    return tmp_path / "run" / "adapter", data


def test_the_loss_of_quality_is_measured_as_the_adapter_was_trained(asked, answer, tmp_path):
    adapter, data = asked
    words = ("prune", adapter, "--energy", "0.6", "--data", data)
    code, found = answer(*words, "-o", tmp_path / "small")
    assert code == 0
    measured = found["measured"]["systems"]
    for name, path in (("adapter", adapter), ("pruned", tmp_path / "small")):
        _, again = answer("eval", data, "--adapter", path, "--metrics", "perplexity")
        expected = again["systems"]["adapter"]["scores"]["perplexity"]["value"]
        assert measured[name]["scores"]["perplexity"]["value"] == pytest.approx(expected, rel=1e-5)
    code, chat = answer(*words, "--template", "chat", "-o", tmp_path / "chat")
    assert code == 0
    other = chat["measured"]["systems"]["adapter"]["scores"]["perplexity"]["value"]
    assert other != pytest.approx(measured["adapter"]["scores"]["perplexity"]["value"], rel=1e-3)


def test_flags_of_the_measurement_need_rows(asked, answer, tmp_path):
    adapter, _ = asked
    for flag in (["--limit", "3"], ["--column", "prompt=q"], ["--model", "x"], ["--any-base"]):
        code, found = answer("prune", adapter, "-o", tmp_path / "out", "--energy", "0.5", *flag)
        assert code == 2
        assert flag[0] in json.dumps(found)
    assert not (tmp_path / "out").exists()
