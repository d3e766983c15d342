"""A tiny random Llama with a chat template, three adapters on disk, and a server over them."""

from __future__ import annotations

import json
import shutil
import string
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from learned import attach_learned
from lorakit.adapters.attach import detach
from lorakit.adapters.spec import LoraSpec
from lorakit.formats.peft import save_adapter
from lorakit.models.load import load_model
from lorakit.serve.app import create_app
from lorakit.serve.run import ListenOptions, listen, url_of
from lorakit.serve.service import Service
from lorakit.serve.start import ServeSettings, started

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONTEXT = 256
SYSTEM = "Answer in SQL."


def write_base(path: Path) -> Path:
    """One token per byte, letters first, so that answers hold halves of characters too."""
    specials = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<system>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    others = sorted(set(alphabet) - set(string.ascii_letters))
    vocab = {t: i for i, t in enumerate([*specials, *string.ascii_letters, *others])}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[3:],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def write_adapters(base: Path, directory: Path) -> Path:
    """sql (rank 4, trained with a system turn), chat (rank 2), broken (cut off in the middle)."""
    model, _ = load_model(base)
    model.requires_grad_(False)
    data = {"config": {"data": {"system": SYSTEM, "template": "auto"}}, "metrics": {"loss": 0.25}}
    for name, r, passport, seed in (("sql", 4, data, 1), ("chat", 2, {}, 2)):
        spec = LoraSpec(r=r, alpha=3 * r, targets="all-linear")
        attach_learned(model, spec, name, seed=seed, size=0.3)
        save_adapter(model, directory / name, name, passport=passport)
        detach(model, name)
    shutil.copytree(directory / "chat", directory / "broken")
    file = directory / "broken" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    return directory


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """The service on a real socket, in a thread; gives its address."""
    listening = listen(ListenOptions(port=0))
    server = uvicorn.Server(
        uvicorn.Config(create_app(service), log_config=None, access_log=False, lifespan="off")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield url_of(listening)
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


@contextmanager
def in_process(settings: ServeSettings) -> Iterator[Service]:
    """An engine and a service over the settings' model, with no socket."""
    model, tokenizer = load_model(settings.model)
    with started(model, tokenizer, settings) as service:
        yield service


def asking(service: Service) -> httpx.AsyncClient:
    """A client that calls the application itself."""
    transport = httpx.ASGITransport(app=create_app(service))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60)


def events(text: str) -> list[dict[str, object]]:
    """The chunks of a stream's text; it must end as OpenAI's do."""
    lines = [line for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
