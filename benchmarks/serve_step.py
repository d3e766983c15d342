"""One decode step and one prefill with an adapter per row, as ratios; part of serve.py."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from lorakit.adapters.attach import attach, detach
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.spec import LoraSpec
from lorakit.serve.batches import PackedBatch
from lorakit.serve.layer import ServedModel
from lorakit.serve.request import GenerateRequest, SamplingOptions
from lorakit.serve.row import Row
from lorakit.serve.sampler import RowSampler
from lorakit.serve.served import ServedAdapter, served_form
from serve_rounds import Bench, pretend_learned, ratios, sharing, spread

NUM_ROWS = 8
PREFILL = 64
CONTEXT = 64
WARM_UP = 2  # rounds that are not counted
PEFT_NAMES = [f"k{i}" for i in range(NUM_ROWS)]

OVER = {
    "adapters": "base",
    "changing": "base",
    "one adapter": "base",
    "peft": "transformers",
    "base": "transformers",
}


def decode_section(bench: Bench) -> Iterator[dict[str, Any]]:
    """One decode step of 8 rows behind a context each."""
    model = bench.model
    adapters = _adapters(model)
    calls = {
        "base": _decoder(bench, [None] * NUM_ROWS),
        "adapters": _decoder(bench, adapters),
        "changing": _decoder(bench, adapters, changing=True),
        "one adapter": _decoder(bench, adapters[:1] * NUM_ROWS),
        "transformers": _hf_decoder(bench, sharing(model), None),
        "peft": _hf_decoder(bench, _peft_model(sharing(model)), PEFT_NAMES),
    }
    yield from _compare(bench, calls, {"context": CONTEXT})


def prefill_section(bench: Bench) -> Iterator[dict[str, Any]]:
    """Eight prompts of 64 tokens in one pass."""
    model = bench.model
    calls = {
        "base": _prefiller(bench, [None] * NUM_ROWS),
        "adapters": _prefiller(bench, _adapters(model)),
        "transformers": _hf_prefiller(bench, sharing(model), None),
        "peft": _hf_prefiller(bench, _peft_model(sharing(model)), PEFT_NAMES),
    }
    yield from _compare(bench, calls, {"prompt": PREFILL})


def _adapters(model: Any) -> list[ServedAdapter | None]:
    first = _random_adapter(model, "k0")
    return [first, *(_like(first, f"k{i}", seed=i) for i in range(1, NUM_ROWS))]


def _compare(
    bench: Bench, calls: dict[str, Callable[[], None]], facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Times of each call, and of its ratio to another one of the same round.

    CPU seconds are given beside those of the clock: they hold where others use the machine too.
    """
    order = random.Random(bench.seed)
    times: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for index in bench.rounds(at_least=WARM_UP + 3, at_most=60):
        for name in order.sample(sorted(calls), len(calls)):
            start, cpu_start = time.perf_counter(), time.process_time()
            with torch.inference_mode():
                calls[name]()
            if index >= WARM_UP:
                times[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
        if index >= WARM_UP:
            found: dict[str, Any] = {"rows": NUM_ROWS, "r": 8, "targets": "all-linear", **facts}
            for name in calls:
                found[name] = {"ms": spread([1000 * t for t in times[name]], 1)}
                other = OVER.get(name)
                if other is not None:
                    found[name][f"over_{other}"] = ratios(times[name], times[other])
                    found[name][f"cpu_over_{other}"] = ratios(cpu[name], cpu[other])
            yield found


def _row(tokenizer: Any, prompt: list[int], name: str, served: ServedAdapter | None) -> Row:
    options = SamplingOptions(max_tokens=100_000, ignore_eos=True)
    request = GenerateRequest(id=name, prompt_ids=tuple(prompt), sampling=options)
    row = Row(
        request=request,
        wanted=None,
        on_event=lambda _: None,
        sampler=RowSampler(options),
        tokenizer=tokenizer,
        limit=100_000,
    )
    row.start(served)
    return row


def _decoder(
    bench: Bench, adapters: list[ServedAdapter | None], *, changing: bool = False
) -> Callable[[], None]:
    """Steps of 8 rows behind a context of their own."""
    model = sharing(bench.model)
    served = ServedModel(model)
    served.prepack()
    batch = PackedBatch(served, model, max_rows=NUM_ROWS, chunk=512)
    for i, adapter in enumerate(adapters):
        batch.add(_row(bench.tokenizer, bench.prompt(CONTEXT, i), f"r{i}", adapter))
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if changing:
            # One row leaves and another comes: its place in the bank is written anew.
            rows = batch.rows()
            rows[steps % NUM_ROWS].served = adapters[(steps * 3) % NUM_ROWS]
            batch._routing = None
        with batch.mode():
            batch.step(lambda row, choice: row.generated.append(choice.token))  # type: ignore[union-attr]

    with torch.inference_mode(), batch.mode():
        while len(batch._answering) < NUM_ROWS:
            batch.step(lambda row, choice: row.generated.append(choice.token))  # type: ignore[union-attr]
    return step


def _prefiller(bench: Bench, adapters: list[ServedAdapter | None]) -> Callable[[], None]:
    model = sharing(bench.model)
    served = ServedModel(model)
    served.prepack()

    def step() -> None:
        batch = PackedBatch(served, model, max_rows=NUM_ROWS, chunk=512)
        for i, adapter in enumerate(adapters):
            batch.add(_row(bench.tokenizer, bench.prompt(PREFILL, i), f"r{i}", adapter))
        with batch.mode():
            batch.step(lambda row, choice: row.generated.append(choice.token))  # type: ignore[union-attr]
        assert len(batch._answering) == NUM_ROWS

    return step


def _hf_decoder(bench: Bench, model: Any, names: list[str] | None) -> Callable[[], None]:
    ids = torch.tensor([bench.prompt(CONTEXT, i) for i in range(NUM_ROWS)])
    given = {} if names is None else {"adapter_names": names}
    state: dict[str, Any] = {}

    def step() -> None:
        if not state:
            cache = DynamicCache()
            out = model(input_ids=ids, past_key_values=cache, logits_to_keep=1, **given)
            state.update(cache=cache, last=out.logits[:, -1].argmax(-1, keepdim=True))
        out = model(
            input_ids=state["last"], past_key_values=state["cache"], logits_to_keep=1, **given
        )
        state["last"] = out.logits[:, -1].argmax(-1, keepdim=True)

    return step


def _hf_prefiller(bench: Bench, model: Any, names: list[str] | None) -> Callable[[], None]:
    ids = torch.tensor([bench.prompt(PREFILL, i) for i in range(NUM_ROWS)])
    given = {} if names is None else {"adapter_names": names}
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)


def _peft_model(model: Any) -> Any:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    wrapped = get_peft_model(model, config, adapter_name="k0")
    for i in range(1, NUM_ROWS):
        wrapped.add_adapter(f"k{i}", config)
    return wrapped.eval()


def _random_adapter(model: Any, key: str) -> ServedAdapter:
    attach(model, LoraSpec(r=8, alpha=16, targets="all-linear"), name="one")
    pretend_learned(model, 0)
    adapter = adapter_from_model(model, "one")
    detach(model)
    return served_form(model, adapter, key)


def _like(adapter: ServedAdapter, key: str, *, seed: int) -> ServedAdapter:
    """Other numbers in the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    sites = {
        name: replace(
            site,
            A=0.04 * torch.randn(site.A.shape, generator=generator),
            B=0.02 * torch.randn(site.B.shape, generator=generator),
        )
        for name, site in adapter.sites.items()
    }
    return ServedAdapter(key, sites)
