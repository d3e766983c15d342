"""The whole demo on SmolLM2 itself, with a handful of rows: every step and every file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.cli.demo import show
from lorakit.demo.run import DemoRequest, run_demo
from lorakit.demo.tasks import build_task, sql_task
from lorakit.errors import OutputError, RequestError
from lorakit.formats.peft import read_adapter


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    whole = sql_task(3)
    task = dataclasses.replace(
        whole,
        train=whole.train[:12],
        held_out=whole.held_out[:4],
        max_new_tokens=12,
        training={**whole.training, "batch_size": 2},
    )
    output = tmp_path_factory.mktemp("demo") / "out"
    said: list[str] = []
    request = DemoRequest(task=task, output=output, seed=3, seconds=1.0)
    result = run_demo(request, say=said.append)
    assert any("schemas absent from training" in line for line in said)
    assert "training ends after 3 min 0 s" in said
    return output, result


@pytest.mark.real
def test_the_result_has_what_is_promised(demo):
    output, result = demo
    assert json.loads((output / "result.json").read_text(encoding="utf-8")) == result
    for system in ("base", "base_2shot", "adapter"):
        for metric in ("execution_accuracy", "exact_match"):
            estimate = result[system][metric]
            assert estimate["n"] == 4
            low, high = estimate["interval"]
            assert 0 <= low <= estimate["value"] <= high <= 1
            assert low < high
    assert 0 <= result["merge"]["max_abs_logit_error"] <= result["merge"]["tolerance"]
    assert result["seconds"] > 0
    assert len(result["samples"]) == 4
    assert all(sample["reference_rows"] for sample in result["samples"])


@pytest.mark.real
def test_what_the_command_prints_can_be_printed(demo, capsys):
    output, result = demo
    show(result, output)
    printed = capsys.readouterr().out
    assert "held-out questions" in printed
    assert "merge certificate" in printed
    assert str(result["base"]["execution_accuracy"]["n"]) in printed


@pytest.mark.real
def test_the_adapter_is_counted_trained_and_its_own(demo):
    output, result = demo
    adapter = read_adapter(output / "adapter")
    assert adapter.num_params() == result["trainable_params"]
    assert any(bool(factors.B.any()) for factors in adapter.factors.values())
    # The base is named so that another machine finds it.
    assert adapter.config["base_model_name_or_path"] == "smollm2-135m-instruct"
    assert adapter.passport["data"]["train"]["sha256"]


@pytest.mark.real
def test_plain_transformers_loads_the_merged_model_and_it_is_the_live_one(demo, smollm2):
    output, _ = demo
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode("SELECT name FROM book WHERE")])
    lk.load_adapter(model, output / "adapter", name="demo")
    try:
        with torch.no_grad():
            live = model(ids).logits
    finally:
        lk.detach(model)
    merged = AutoModelForCausalLM.from_pretrained(output / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, live, rtol=1e-4, atol=1e-3)
    assert not list((output / "merged").glob("adapter*"))


@pytest.mark.real
def test_the_report_stands_alone(demo):
    output, _ = demo
    html = (output / "report.html").read_text(encoding="utf-8")
    assert "<svg" in html
    assert "src=" not in html
    # Inside its drawings the page refers to itself; to nothing else.
    assert "href=" not in html.replace('href="#', "")


@pytest.mark.real
def test_another_demo_replaces_it_but_nothing_else_is_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="not empty"):
        run_demo(DemoRequest(task=build_task("sql", 0), output=tmp_path), say=lambda line: None)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(RequestError, match="reviews"):
        build_task("revews", 0)


def test_conversations_share_a_schema_and_held_out_schemas_are_new():
    task = sql_task(1)
    learned = {row["messages"][1]["content"].split("\n")[0] for row in task.train}
    asked = {row["messages"][1]["content"].split("\n")[0] for row in task.held_out}
    assert len(task.held_out) >= 150
    assert not learned & asked
    assert all(len(row["messages"]) == 1 + 2 * 4 for row in task.train)
