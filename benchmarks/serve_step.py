"""One decode step and one prefill with an adapter per row, as ratios; part of serve.py."""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
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

NUM_ROWS = 8
PREFILL = 64
CONTEXT = 64


def step_part(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    first = _random_adapter(model, "k0")
    adapters = [first, *(_like(first, f"k{i}", seed=i) for i in range(1, NUM_ROWS))]
    peft_model = _peft_model(_sharing(model))
    ours = _sharing(model)
    calls = {
        "decode": {
            "base": _decoder(_sharing(model), tokenizer, [None] * NUM_ROWS),
            "adapters": _decoder(ours, tokenizer, adapters),
            "changing": _decoder(_sharing(model), tokenizer, adapters, changing=True),
            "one adapter": _decoder(_sharing(model), tokenizer, adapters[:1] * NUM_ROWS),
            "transformers": _hf_decoder(_sharing(model), None),
            "peft": _hf_decoder(peft_model, [f"k{i}" for i in range(NUM_ROWS)]),
        },
        "prefill": {
            "base": _prefiller(_sharing(model), tokenizer, [None] * NUM_ROWS),
            "adapters": _prefiller(_sharing(model), tokenizer, adapters),
            "transformers": _hf_prefiller(_sharing(model), None),
            "peft": _hf_prefiller(peft_model, [f"k{i}" for i in range(NUM_ROWS)]),
        },
    }
    over = {
        "adapters": "base",
        "changing": "base",
        "one adapter": "base",
        "peft": "transformers",
        "base": "transformers",
    }
    return {
        "rows": NUM_ROWS,
        "r": 8,
        "targets": "all-linear",
        "context": CONTEXT,
        "decode": _compare(calls["decode"], over, args),
        "prefill_8x64": _compare(calls["prefill"], over, args),
    }


def _compare(
    calls: dict[str, Callable[[], None]], over: dict[str, str], args: argparse.Namespace
) -> dict[str, Any]:
    """Median times of each call, and of its ratio to another one of the same round.

    CPU seconds are given beside those of the clock: they hold where others use the machine too.
    """
    order, rounds, seconds = random.Random(args.seed), args.rounds, args.seconds
    times_of: dict[str, list[float]] = {name: [] for name in calls}
    cpu_of: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        until = time.monotonic() + seconds
        for index in range(rounds + 2):
            if time.monotonic() > until and index > 4:
                break
            for name in order.sample(sorted(calls), len(calls)):
                start, cpu = time.perf_counter(), time.process_time()
                calls[name]()
                if index >= 2:  # the first rounds warm up
                    times_of[name].append(time.perf_counter() - start)
                    cpu_of[name].append(time.process_time() - cpu)
    found: dict[str, Any] = {"rounds": len(times_of["base"])}
    for name, times in times_of.items():
        entry: dict[str, Any] = {
            "median_ms": round(1000 * statistics.median(times), 2),
            "median_cpu_ms": round(1000 * statistics.median(cpu_of[name]), 2),
        }
        other = over.get(name, "")
        if other in times_of:
            entry[f"over_{other}"] = _ratio(times, times_of[other])
            entry[f"cpu_over_{other}"] = _ratio(cpu_of[name], cpu_of[other])
        found[name] = entry
    print(json.dumps(found), flush=True)
    return found


def _ratio(times: list[float], others: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


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
    model: Any, tokenizer: Any, adapters: list[ServedAdapter | None], *, changing: bool = False
) -> Callable[[], None]:
    """Steps of 8 rows behind a context of their own."""
    batch = PackedBatch(ServedModel(model), model, max_rows=NUM_ROWS, chunk=512)
    for i, adapter in enumerate(adapters):
        batch.add(_row(tokenizer, random_prompt(CONTEXT, i), f"r{i}", adapter))
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


def _prefiller(
    model: Any, tokenizer: Any, adapters: list[ServedAdapter | None]
) -> Callable[[], None]:
    served = ServedModel(model)

    def step() -> None:
        batch = PackedBatch(served, model, max_rows=NUM_ROWS, chunk=512)
        for i, adapter in enumerate(adapters):
            batch.add(_row(tokenizer, random_prompt(PREFILL, i), f"r{i}", adapter))
        with batch.mode():
            batch.step(lambda row, choice: row.generated.append(choice.token))  # type: ignore[union-attr]
        assert len(batch._answering) == NUM_ROWS

    return step


def _hf_decoder(model: Any, names: list[str] | None) -> Callable[[], None]:
    ids = torch.tensor([random_prompt(CONTEXT, i) for i in range(NUM_ROWS)])
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


def _hf_prefiller(model: Any, names: list[str] | None) -> Callable[[], None]:
    ids = torch.tensor([random_prompt(PREFILL, i) for i in range(NUM_ROWS)])
    given = {} if names is None else {"adapter_names": names}
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)


def _peft_model(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

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


def pretend_learned(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def _sharing(model: Any) -> Any:
    """A second tree of modules around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def random_prompt(length: int, seed: int) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(1000, 40_000) for _ in range(length)]
