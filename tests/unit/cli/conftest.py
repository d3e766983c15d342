"""A tiny model, data and a run, made once for all tests of the verbs."""

from __future__ import annotations

import json
import string

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorakit.cli.main import main

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny Llama with one token per character and a chat template."""
    path = tmp_path_factory.mktemp("models") / "tiny-base"
    specials = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<system>"]
    letters = string.ascii_letters + string.digits + string.punctuation + " \n"
    vocab = {token: index for index, token in enumerate([*specials, *letters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[3:],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{a}+{b}", "completion": str(a + b)} for a in range(4) for b in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def run_directory(base, data, tmp_path_factory):
    """What `lorakit train` leaves."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "config.yaml"
    config.write_text(
        f"model: {{ref: {base}}}\ndata: {{train: {data}}}\noutput: {folder / 'run'}\n"
    )
    words = ["lora.r=4", "lora.targets=all-linear", "train.epochs=1", "train.batch_size=4"]
    assert main(["train", str(config), *words, "train.lr=0.01"]) == 0
    return folder / "run"


@pytest.fixture
def answer(capsys):
    """Runs a verb with --json: its exit code and its result."""

    def ask(*words):
        code = main([*map(str, words), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return ask
