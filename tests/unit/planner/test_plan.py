import json

import pytest
from transformers import BertConfig

from lorakit.cli.main import main
from lorakit.errors import ModelError, RequestError
from lorakit.planner.devices import CONTEXT_BYTES, GPU_KINDS, fits
from lorakit.planner.generation import estimate_generation
from lorakit.planner.plan import RunRequest, plan_run

SHAPE = {"batch_size": 2, "length": 24, "labels": 10}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    import tiny_models

    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_models.build("llama").save_pretrained(path)
    for file in path.glob("*.safetensors"):
        file.unlink()  # the configuration alone is enough
    return path


def answer(capsys, *words):
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_plan_needs_the_configuration_alone(directory, capsys):
    words = ["--rank", 4, "--targets", "all-linear", "--batch-size", 2, "--length", 24]
    code, found = answer(capsys, "plan", "--model", directory, "--method", "lora", *words)
    assert code == 0
    memory = found["memory"]
    terms = [v for k, v in memory.items() if k not in ("trained_bytes", "total_bytes")]
    assert memory["total_bytes"] == sum(terms)
    assert memory["activations_bytes"] > 0
    assert found["batch"] == {"rows": 2, "length": 24, "labels": 48}
    assert found["fits"] is True
    assert {fit["fits"] for fit in found["gpus"]} == {True}
    # Keys and values: 2 layers, 2 key heads of width 8, 24 positions, float32, both of them.
    assert found["generation"]["cache_bytes"] == 2 * 2 * 2 * 8 * 24 * 4
    assert found["time"]["step_flops"] > 0
    assert found["time"]["epoch_s"] is None


def test_time_follows_from_a_stated_rate(directory, capsys):
    words = ["plan", directory, "--flops", "1e9", "--num-examples", 100, "--batch-size", 4]
    time = answer(capsys, *words)[1]["time"]
    assert time["step_s"] == pytest.approx(time["step_flops"] / 1e9)
    assert time["epoch_s"] == pytest.approx(25 * time["step_s"])
    assert main([*map(str, words)]) == 0
    assert "an epoch" in capsys.readouterr().out


def test_a_micro_step_says_the_time_here(directory, capsys):
    words = ["plan", directory, "--calibrate", "--batch-size", 2, "--length", 16]
    code, found = answer(capsys, *words)
    assert code == 0
    assert found["time"]["calibrated"] is True
    assert 0 < found["time"]["step_s"] < 60
    assert found["time"]["flops_per_s"] == pytest.approx(
        found["time"]["step_flops"] / found["time"]["step_s"]
    )
    assert answer(capsys, *words, "--quantize", "nf4")[0] == 2


def test_what_does_not_fit_gets_advice_ranked_by_what_it_saves(directory, capsys):
    words = [
        "plan",
        directory,
        "--length",
        24,
        "--memory",
        "0.00001",
        "--batch-size",
        2,
        "--targets",
        "all-linear",
        "--precision",
    ]
    code, found = answer(capsys, *words, "fp32")
    assert code == 0
    assert found["fits"] is False
    saved = [change["saved_bytes"] for change in found["changes"]]
    assert saved == sorted(saved, reverse=True)
    assert found["changes"][0]["what"] == "all of these"
    total = found["memory"]["total_bytes"]
    assert all(c["total_bytes"] == total - c["saved_bytes"] for c in found["changes"])
    named = " ".join(change["what"] for change in found["changes"])
    # Not 4 bits: so small a base gives up more on the way of its layers than it saves in weights.
    for change in ("gradient_checkpointing", "batch_size: 1", "lora.r: 4", "targets: qv"):
        assert change in named
    assert main([*map(str, words), "fp32"]) == 0
    assert "would save memory" in capsys.readouterr().out


def test_nf4_is_planned_and_refused_where_weights_are_trained(directory, capsys):
    words = ["plan", directory, "--length", 24, "--dtype", "bfloat16"]
    dense = answer(capsys, *words)[1]
    packed = answer(capsys, *words, "--quantize", "nf4")[1]
    assert packed["memory"]["base_bytes"] < dense["memory"]["base_bytes"]
    assert packed["setup"]["quantize"] == "nf4"
    code, error = answer(capsys, "plan", directory, "--method", "full", "--quantize", "nf4")
    assert (code, error["error"]["type"]) == (2, "SpecError")


def test_a_base_that_is_stored_in_4_bits_is_planned_so(directory, tmp_path, capsys):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    packed = answer(capsys, "plan", directory, "--dtype", "bfloat16", "--quantize", "nf4")[1]
    stored = answer(capsys, "plan", tmp_path, "--dtype", "bfloat16")[1]
    assert stored["memory"]["base_bytes"] == packed["memory"]["base_bytes"]


def test_a_classifier_is_planned_with_its_head(directory):
    plain = plan_run(RunRequest(model=directory, **SHAPE))
    headed = plan_run(RunRequest(model=directory, classes=3, **SHAPE))
    assert headed.generation is None
    assert plain.generation is not None
    # No vocabulary to predict: 128 x 32 less, 3 x 32 more.
    assert plain.num_base_params - headed.num_base_params == (128 - 3) * 32


def test_a_masked_language_model_is_planned_and_does_not_generate(tmp_path):
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        architectures=["BertForMaskedLM"],
    )
    config.save_pretrained(tmp_path)
    found = plan_run(RunRequest(model=tmp_path, **SHAPE))
    assert found.generation is None
    assert found.memory.activations_bytes > 0
    with pytest.raises(ModelError, match="does not generate"):
        estimate_generation(found.model, rows=1, positions=8, setup=found.setup)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batch-size", "0"], "batch_size must be positive"),
        (["--flops", "-1"], "flops_per_s must be positive"),
        (["--method", "bitfit"], "no bias vectors"),
        (["--model", "other"], "one model is planned for"),
    ],
)
def test_what_cannot_be_planned_is_refused(directory, capsys, words, says):
    assert main(["plan", str(directory), *words]) == 2
    assert says in capsys.readouterr().err.replace("\n", " ")


def test_a_name_that_is_nothing_lists_what_there_is():
    with pytest.raises(ModelError) as caught:
        plan_run(RunRequest(model="llama-3-80b"))
    assert "llama-3-8b" in str(caught.value)
    with pytest.raises(RequestError):
        RunRequest(model="gpt2", length=-3)


def test_a_run_fits_where_memory_and_context_leave_room():
    largest = max(GPU_KINDS, key=lambda gpu: gpu.memory_bytes)
    room = largest.memory_bytes - CONTEXT_BYTES
    exact = {fit.gpu.name: fit for fit in fits(room)}[largest.name]
    over = {fit.gpu.name: fit for fit in fits(room + 1)}[largest.name]
    assert (exact.fits, exact.count) == (True, 1)
    assert (over.fits, over.count) == (False, 2)
