"""What `lorakit plan` prints: the plan as plain values, and as tables."""

from __future__ import annotations

from typing import Any

from lorakit.adapters.plan import AdapterPlan, plan_adapter
from lorakit.cli import console
from lorakit.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    format_share,
)
from lorakit.methods.lora import LoraMethod
from lorakit.planner.memory import TrainingSetup
from lorakit.planner.plan import RunPlan

Record = dict[str, Any]

_FLOAT32_BYTES = 4


def plan_record(plan: RunPlan, *, limit_bytes: int | None, advise: bool) -> Record:
    """The plan as plain values.

    Args:
        plan: the plan.
        limit_bytes: the memory that may be taken, if there is a limit.
        advise: whether to look for what to change.
    """
    memory = plan.memory
    network = plan.network
    record: Record = {
        "model": str(plan.request.model),
        "class": type(plan.model).__name__,
        "method": plan.method.name,
        "options": plan.method.options(),
        "base_params": plan.num_base_params,
        "trainable_params": plan.report.num_trainable,
        "trainable_share": plan.report.share,
        "adapter_bytes": plan.checkpoint_bytes,
        "base_float32_bytes": plan.num_base_params * _FLOAT32_BYTES,
        "training_bytes": memory.least_bytes,
        **_sites(plan),
        "notes": [*plan.report.notes, *memory.notes],
        "batch": {
            "rows": plan.request.batch.rows,
            "length": plan.request.batch.length,
            "labels": plan.request.batch.labels,
        },
        "setup": _setup(plan.setup),
        "memory": memory.to_json(),
        "limit_bytes": limit_bytes,
        "fits": None if limit_bytes is None else memory.total_bytes <= limit_bytes,
        "generation": None if plan.generation is None else plan.generation.to_json(),
        "gpu_memory": plan.gpu_memory.to_json(),
        "gpus": [
            {
                "gpu": fit.gpu.name,
                "memory_bytes": fit.gpu.memory_bytes,
                "used": fit.used,
                "fits": fit.fits,
                "count": fit.count,
            }
            for fit in plan.gpus
        ],
        "time": _time(plan),
        "processes": plan.request.processes,
        "sharded": plan.request.shard,
        "network": None
        if network is None
        else {"bandwidth_gbps": plan.request.bandwidth_gbps, **network.to_json()},
    }
    if advise:
        record["changes"] = [
            {"what": c.what, "total_bytes": c.total_bytes, "saved_bytes": c.saved_bytes}
            for c in plan.changes()
        ]
    return record


def _setup(setup: TrainingSetup) -> Record:
    return {
        "device": setup.device,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "quantize": "nf4" if setup.four_bit else None,
        "precision": "bf16" if setup.bf16 else "fp32",
        "gradient_checkpointing": setup.checkpointing,
        "attention": setup.attention,
    }


def _sites(plan: RunPlan) -> Record:
    if not isinstance(plan.method, LoraMethod):
        return {"sites": [{"site": site} for site in plan.report.sites]}
    adapter: AdapterPlan = plan_adapter(plan.model, plan.method.spec)
    return {
        "spec": adapter.spec.to_dict(),
        "sites": [
            {
                "site": site.name,
                "shape": list(site.shape),
                "r": site.r,
                "scaling": site.scaling,
                "num_params": site.num_params(),
            }
            for site in adapter.sites
        ],
        "trained_beside": [site.module for site in adapter.overrides],
        "trained_beside_params": {s.module: s.num_params() for s in adapter.overrides},
    }


def _time(plan: RunPlan) -> Record:
    counts = plan.training.counts
    return {
        "step_flops": None if counts is None else counts.flops,
        "flops_per_s": plan.request.flops_per_s
        if plan.calibration is None
        else plan.calibration.flops_per_s,
        "calibrated": plan.calibration is not None,
        "step_s": plan.step_s,
        "epoch_s": plan.epoch_s,
    }


def show_plan(record: Record, *, every_site: bool) -> None:
    """Print the plan.

    Args:
        record: see `plan_record`.
        every_site: one line per site instead of one per kind of site.
    """
    share, sites = format_share(record["trainable_share"]), record["sites"]
    is_lora = "spec" in record
    learned = f"{format_count(record['trainable_params'])} parameters ({share} of all)"
    console.print_facts(
        f"{record['model']} ({record['class']})",
        {
            "base": f"{format_count(record['base_params'])} parameters, "
            f"{format_bytes(record['base_float32_bytes'])} in float32",
            "adapter" if is_lora else "method": learned
            + f", {format_bytes(record['adapter_bytes'])}"
            if is_lora
            else f"{record['method']}, {learned} at {len(sites)} sites, "
            f"{format_bytes(record['adapter_bytes'])}",
            "run": _run_words(record),
            "time": _time_words(record),
            **_network_facts(record),
        },
    )
    if is_lora:
        _show_sites(record, every_site)
    else:
        for site in sites if every_site else ():
            console.print_text(site["site"])
    _show_memory(record)
    _show_gpus(record)
    _show_changes(record)
    for note in record["notes"]:
        console.note(note)


def _run_words(record: Record) -> str:
    batch, setup = record["batch"], record["setup"]
    words = [
        f"{batch['rows']} rows of {format_count(batch['length'])} tokens, "
        f"{format_count(batch['labels'])} of them learned",
        f"{setup['quantize'] or setup['dtype']} weights",
        f"{setup['precision']} arithmetic",
        f"on {setup['device']}",
    ]
    if setup["gradient_checkpointing"]:
        words.append("activations recomputed")
    return ", ".join(words)


def _time_words(record: Record) -> str:
    time = record["time"]
    if time["step_flops"] is None:
        return "not counted"
    words = [f"{time['step_flops']:.3g} operations a step"]
    if time["step_s"] is not None:
        how = "a micro-step here reached" if time["calibrated"] else "at"
        words.append(
            f"{format_duration(time['step_s'])} {how} {time['flops_per_s']:.3g} per second"
        )
    if time["epoch_s"] is not None:
        words.append(f"an epoch {format_duration(time['epoch_s'])}")
    return ", ".join(words)


def _network_facts(record: Record) -> dict[str, str]:
    if record["processes"] == 1:
        return {}
    how = "that split the base" if record["sharded"] else "that each hold the base"
    found = {"processes": f"{record['processes']} {how}"}
    network = record["network"]
    if network is None:
        return found
    words = [f"gradients {format_bytes(network['gradient_bytes'])} each"]
    if network["sharded"]:
        words.append(f"the base's parts {format_bytes(network['base_bytes'])}")
    seconds = format_duration(network["gradient_s"] + network["base_s"])
    text = f"{', '.join(words)}: {seconds} at {network['bandwidth_gbps']:g} Gbit/s"
    if network["compute_s"] is not None:
        low, high = network["fastest_step_s"], network["slowest_step_s"]
        text += f"; a step {format_duration(low)} to {format_duration(high)} (calculated)"
    return {**found, "network": text}


def _show_memory(record: Record) -> None:
    of = " in each process" if record["processes"] > 1 else ""
    table = console.table(f"memory of a step{of}", ["term", "bytes"], numbers=["bytes"])
    memory = record["memory"]
    for name, size in memory.items():
        if size and name not in ("trained_bytes", "total_bytes"):
            table.add_row(name.removesuffix("_bytes").replace("_", " "), format_bytes(size))
    table.add_section()
    table.add_row("total", format_bytes(memory["total_bytes"]))
    if record["limit_bytes"] is not None:
        verdict = "fits" if record["fits"] else "does not fit"
        table.add_row(f"{verdict} in", format_bytes(record["limit_bytes"]))
    console.stdout().print(table)
    generation = record["generation"]
    if generation is not None:
        length = format_count(record["batch"]["length"])
        console.print_facts(
            None,
            {
                "to answer": f"{format_bytes(generation['total_bytes'])} for one row of {length} "
                f"tokens: weights {format_bytes(generation['weights_bytes'])}, keys and values "
                f"{format_bytes(generation['cache_bytes'])}, the pass over the prompt "
                f"{format_bytes(generation['prompt_bytes'])}"
            },
        )


def _show_gpus(record: Record) -> None:
    total = format_bytes(record["gpu_memory"]["total_bytes"])
    title = f"on a GPU: {total} and CUDA's own"
    table = console.table(title, ["GPU", "filled", "fits", "if split"], numbers=["filled"])
    for fit in record["gpus"]:
        verdict = "yes" if fit["fits"] else "no"
        split = "" if fit["fits"] else f"{fit['count']} of them"
        table.add_row(fit["gpu"], format_share(fit["used"]), verdict, split)
    console.stdout().print(table)


def _show_changes(record: Record) -> None:
    if "changes" not in record:
        return
    columns = ["change", "saves", "then"]
    table = console.table("what would save memory", columns, numbers=columns[1:])
    for change in record["changes"]:
        sizes = (format_bytes(change["saved_bytes"]), format_bytes(change["total_bytes"]))
        table.add_row(change["what"], *sizes)
    console.stdout().print(table)


def _show_sites(record: Record, every_site: bool) -> None:
    columns = ["sites", "of", "out x in", "r", "scaling", "parameters"]
    table = console.table(f"{len(record['sites'])} sites", columns, numbers=columns[1:])
    groups: dict[tuple[str, tuple[int, ...], int, float], list[int]] = {}
    for site in record["sites"]:
        name = site["site"] if every_site else _last_names(site["site"])
        key = (name, tuple(site["shape"]), site["r"], site["scaling"])
        groups.setdefault(key, []).append(site["num_params"])
    for (name, shape, r, scaling), params in groups.items():
        size = " x ".join(map(str, shape))
        counts = (str(len(params)), size, str(r), format_number(float(scaling)))
        table.add_row(name, *counts, format_count(sum(params)))
    for module, num_params in record["trained_beside_params"].items():
        table.add_row(f"{module}, trained whole", "1", "", "", "", format_count(num_params))
    console.stdout().print(table)


def _last_names(name: str) -> str:
    """What repeats in every layer: `self_attn.q_proj` of `layers.3.self_attn.q_proj`."""
    parts = name.split(".")
    last_number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last_number + 1 :])
