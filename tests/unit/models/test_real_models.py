from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from lorakit.errors import LorakitWarning
from lorakit.models.checkpoint import estimate_model_bytes
from lorakit.models.load import load_base_model, load_config
from lorakit.models.named import find_named

pytestmark = pytest.mark.real


def test_smollm2_answers_through_its_chat_template(smollm2):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = output[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id


def test_the_converted_directory_is_dense_float32_and_holds_each_tensor_once(smollm2_path):
    config = json.loads((smollm2_path / "config.json").read_text())
    generation = json.loads((smollm2_path / "generation_config.json").read_text())
    assert "quantization_config" not in config
    assert "quantization_config" not in generation
    with safe_open(smollm2_path / "model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
        dtypes = {tensors.get_slice(name).get_dtype() for name in names}
    assert dtypes == {"F32"}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert estimate_model_bytes(smollm2_path) == 4 * 134_515_008


def test_the_output_head_is_the_embedding(smollm2):
    model, _ = smollm2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


def test_the_tokenizer_splits_digits_first_as_the_model_was_trained(smollm2):
    _, tokenizer = smollm2
    # A plain byte-level splitter gives 'Ġ' 'Ġ' here: it leaves one space to the digit's word.
    assert tokenizer.tokenize("a  1 23") == ["a", "ĠĠ", "1", "Ġ", "2", "3"]
    assert tokenizer.model_max_length == 8192


def test_minilm_embeds_close_sentences_closer(minilm_path):
    from lorakit.models.load import load_tokenizer

    model = load_base_model(minilm_path, device="cpu")
    tokenizer = load_tokenizer(minilm_path)
    batch = tokenizer(
        ["a man plays a guitar", "someone is playing an instrument", "stock prices fell today"],
        padding=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    close, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert close > far + 0.3
    assert load_config(minilm_path).hidden_size == 384


@pytest.mark.slow
def test_two_processes_that_convert_at_once_share_one_whole_result(tmp_path):
    file = tmp_path / "model.gguf"
    shutil.copy(find_named("smollm2-135m-instruct"), file)
    code = (
        "from lorakit.models.resolve import resolve_model\n"
        f"print(resolve_model({str(file)!r}).path)"
    )
    environment = {"LORAKIT_CACHE": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert sorted("converting model from GGUF" in errors for _, errors in results) == [False, True]
    assert estimate_model_bytes(results[0][0].strip()) == 4 * 134_515_008


def test_bfloat16_batches_are_packed_without_a_word(smollm2_path, recwarn):
    from lorakit.models.attention import GROUPED, use_attention
    from lorakit.models.label_head import LabelHead

    model = load_base_model(str(smollm2_path), dtype=torch.bfloat16)
    use_attention(model, GROUPED)
    ids = torch.randint(1000, 9000, (2, 90), generator=torch.Generator().manual_seed(0))
    ids[:, :30] = ids[:1, :30]
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :60], labels[1, 70:], mask[1, 70:] = -100, -100, 0
    head = LabelHead(model)
    head.loss({"input_ids": ids, "labels": labels, "attention_mask": mask})
    assert head.packs
    assert not [w for w in recwarn if issubclass(w.category, LorakitWarning)]
