"""A base without a chat template is trained on turns, with a template of one's own."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from transformers import AutoTokenizer

from lorakit.cli.main import main
from lorakit.data.options import SftOptions
from lorakit.serve.prompts import trained_options

OWN = (
    "{% for m in messages %}({{ m['role'] }}) {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}(assistant) {% endif %}"
)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run with a template whose file is gone."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(base, folder / "base")
    (folder / "base" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert tokenizer.chat_template is None
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+1"}, {"role": "assistant", "content": "2"}]}
        for a in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.jinja").write_text(OWN)
    (folder / "config.yaml").write_text(
        f"model: {folder / 'base'}\noutput: {folder / 'run'}\n"
        f"data: {{train: {folder / 'rows.jsonl'}, chat_template: {folder / 'own.jinja'}}}\n"
    )
    words = ["train", str(folder / "config.yaml"), "lora.r=2", "max_steps=2", "train.epochs=null"]
    assert main(words) == 0
    (folder / "own.jinja").unlink()
    return folder


def test_without_one_turns_are_refused_and_it_is_said_what_to_do(trained, capsys):
    words = ["doctor", str(trained / "config.yaml"), "data.chat_template=null"]
    assert main(words) == 2
    assert "chat_template: FILE" in capsys.readouterr().err


def test_prompts_are_rendered_with_it_afterwards(trained, answer, capsys):
    adapter = trained / "run" / "adapter"
    words = ["generate", "--file", trained / "rows.jsonl", "--adapter", adapter]
    code, result = answer(*words, "--max-new-tokens", 2)
    assert code == 0
    assert result["answers"][0]["prompt"].replace(" ", "") == "(user)0+1(assistant)"
    assert main([*map(str, words), "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    assert "as the adapter was trained: a chat template of its own" in said


def test_chat_takes_it(trained, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1\n"))
    words = ["chat", "--adapter", str(trained / "run" / "adapter"), "--max-new-tokens", "2"]
    assert main(words) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1\n"))
    assert main(["chat", "--model", str(trained / "base")]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_the_merged_model_has_it(trained):
    words = ["merge", str(trained / "run" / "adapter"), "-o", str(trained / "merged")]
    assert main(words) == 0
    assert AutoTokenizer.from_pretrained(trained / "merged").chat_template == OWN


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_other_engines_are_given_it(engine, trained, answer, tmp_path):
    words = ["export", trained / "run" / "adapter", "--for", engine, "-o", tmp_path / "out"]
    code, result = answer(*words)
    assert code == 0
    flag = {"vllm": "--chat-template ", "llama.cpp": "--jinja --chat-template-file "}[engine]
    assert f"{flag}{tmp_path / 'out' / 'chat_template.jinja'}" in result["command"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == OWN


def test_the_server_takes_it(trained):
    passport = json.loads((trained / "run" / "adapter" / "lorakit.json").read_text())
    assert trained_options(passport) == SftOptions(chat_template=OWN)
