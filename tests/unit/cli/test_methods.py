"""The verbs on what methods other than LoRA leave."""

from __future__ import annotations

import json

import pytest
import torch

from lorakit.cli.main import main
from lorakit.models.load import load_base_model

METHODS = {
    "full": ["method=full"],
    "last_layers": ["method=last_layers", "num_layers=1"],
    "bitfit": ["method=bitfit", "add=true"],
}


@pytest.fixture(scope="module")
def runs(base, data, tmp_path_factory):
    """One run per method."""
    folder = tmp_path_factory.mktemp("methods")
    for method, words in METHODS.items():
        config = folder / f"{method}.yaml"
        config.write_text(
            f"model: {{ref: {base}}}\ndata: {{train: {data}}}\noutput: {folder / method}\n"
        )
        words = [*words, "train.epochs=1", "train.batch_size=4", "train.lr=0.02"]
        assert main(["train", str(config), *words]) == 0
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_eval_and_generate_switch_between_the_base_and_the_method(runs, data, answer, method):
    adapter = str(runs / method / "adapter")
    code, found = answer("eval", str(data), "--adapter", adapter, "--metrics", "perplexity")
    assert code == 0
    scores = {name: s["scores"]["perplexity"]["value"] for name, s in found["systems"].items()}
    assert scores["adapter"] < scores["base"]
    code, found = answer("generate", "1+1", "--adapter", adapter, "--max-new-tokens", "4")
    assert code == 0
    assert found["model"]


@pytest.mark.parametrize("method", METHODS)
def test_inspect_shows_the_change_of_every_tensor(runs, answer, method):
    code, found = answer("inspect", str(runs / method / "adapter"))
    assert (code, found["method"], found["note"]) == (0, method, None)
    assert all(site["norm"] > 0 for site in found["sites"])
    assert {site["is_change"] for site in found["sites"]} == {method != "bitfit"}
    assert found["num_params"] == found["passport"]["num_params"]
    assert main(["inspect", str(runs / method / "adapter"), "--sort", "norm", "--top", "2"]) == 0


@pytest.mark.parametrize("method", ["full", "last_layers"])
def test_merge_leaves_a_plain_model_with_its_certificate(runs, answer, tmp_path, method):
    adapter, output = runs / method / "adapter", tmp_path / "merged"
    code, certificate = answer("merge", str(adapter), "-o", str(output))
    assert code == 0
    assert certificate["max_abs_logit_error"] <= certificate["tolerance"]
    assert certificate["stored_dtype"] == "float32"
    assert json.loads((output / "merge.json").read_text())["base"] == certificate["base"]
    assert not (output / "lorakit.json").exists()
    assert (output / "tokenizer.json").is_file()
    merged = load_base_model(output)
    if method == "full":
        ids = torch.tensor([[9, 8, 7]])
        assert merged(ids).logits.equal(load_base_model(adapter)(ids).logits)


def test_added_biases_are_not_merged_and_nothing_is_left(runs, capsys, tmp_path):
    output = tmp_path / "merged"
    assert main(["merge", str(runs / "bitfit" / "adapter"), "-o", str(output)]) == 2
    said = capsys.readouterr().err
    assert "bitfit cannot be merged" in said.replace("\n", " ")
    assert not output.exists()


def test_plan_takes_lists_in_options_with_commas_and_a_single_name(base, answer):
    words = [
        "plan",
        base,
        "--length",
        24,
        "--method",
        "lin",
        "--option",
        "bottleneck=4",
        "--option",
    ]
    both, one = (answer(*words, text)[1] for text in ("blocks=0,1", "blocks=[1]"))
    assert (both["options"]["blocks"], one["options"]["blocks"]) == ([0, 1], [1])
    assert both["trainable_params"] > one["trainable_params"]
    words = ["plan", base, "--length", 24, "--method", "last_layers", "--option"]
    beside = answer(*words, "also_train=model.norm,lm_head")[1]["options"]["also_train"]
    assert beside == ["model.norm", "lm_head"]
    name = answer(*words, r"also_train=layers\.\d{0,1}\.input_layernorm")
    assert name[1]["options"]["also_train"] == [r"layers\.\d{0,1}\.input_layernorm"]


def test_plan_counts_what_any_method_trains(base, answer, capsys):
    code, found = answer("plan", base, "--method", "last_layers", "--option", "num_layers=1")
    # q and o, k and v on two of four heads, three of the MLP, two norms.
    num_block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    assert (code, found["trainable_params"]) == (0, num_block)
    assert found["options"]["num_layers"] == 1
    # Float32 weights once, gradient and two moments of the block, and what the block was.
    assert found["training_bytes"] == 4 * found["base_params"] + (12 + 4) * num_block
    assert main(["plan", str(base), "--method", "full", "--sites"]) == 0
    assert "lm_head.weight" in capsys.readouterr().out
    for words, says in (
        (["--method", "bitfit"], "no bias vectors"),
        (["--method", "bitfit", "--r", "4"], "--r"),
        (["--method", "full", "--option", "keep_base"], "KEY=VALUE"),
        (["--option", "r=4"], "flags of its own"),
    ):
        assert main(["plan", str(base), *words]) == 2
        assert says in capsys.readouterr().err.replace("\n", " ")
