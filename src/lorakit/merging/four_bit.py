"""Merging around a 4-bit base: its weights written dense, and a merged model stored in 4 bits.

What quantizing a merged model costs is measured per layer. With Q for "to NF4 and back", W the
weight that is merged into and D the adapter's change of it:

    share = <Q(W + D) - Q(W), D> / ||D||^2        relative error = ||Q(W + D) - Q(W) - D|| / ||D||

The share is 1 where the change arrives whole on average over the numbers, and 0 where it is smaller
than a step and rounded away; the relative error is what is wrong, in units of the change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.identity import require_same_base
from lorakit.errors import RequestError
from lorakit.files import write_json, writing
from lorakit.math.survival import Survival, overall, survival
from lorakit.merging.plan import MergePlan, changed_value, stored_names
from lorakit.merging.probes import Answers, max_abs_difference
from lorakit.models.checkpoint import copy_companions, weight_files
from lorakit.models.empty import empty_from_config, empty_model
from lorakit.models.load import load_base_model, load_config
from lorakit.models.nf4 import quantization_of
from lorakit.models.quantizable import is_stored_four_bit, products_of, quantizable
from lorakit.models.quiet import quiet_transformers
from lorakit.models.resolve import read_config
from lorakit.models.task_head import ClassificationHead
from lorakit.progress import track
from lorakit.weights.nf4 import FourBitWeight, is_four_bit, round_trip

_INDEX = "model.safetensors.index.json"
FORMULA = (
    "share = <Q(W + D) - Q(W), D> / ||D||^2, relative error = ||Q(W + D) - Q(W) - D|| / ||D||; "
    "Q: to NF4 and back, W: the weight merged into, D: the adapter's change"
)
# Of the logit change that the adapter makes: up to here requantizing keeps it, or part of it.
_KEEPS, _LOSES = 0.2, 0.6


def write_dequantized(
    directory: Path,
    output: Path,
    passport: Mapping[str, Any] | None,
    *,
    head: ClassificationHead | None = None,
) -> None:
    """Write the checkpoint with its linear layers as 4 bits hold them, multiplied out to dense.

    Args:
        directory: the checkpoint: dense, or stored in 4 bits.
        output: an existing, empty directory.
        passport: of the adapter that was trained beside these weights; None accepts any base.
        head: the adapter's classification head.

    Raises:
        BaseMismatchError: the passport names another base.
        RequestError: the checkpoint's tensor names are not the model's own.
    """
    stored = is_stored_four_bit(load_config(directory), directory)
    if passport is not None:
        quantize = None if stored else "nf4"
        require_same_base(load_base_model(directory, quantize, head=head), passport)
    with writing(output):
        if stored:
            _write_multiplied_out(directory, output)
        else:
            _write_rounded(directory, output)


def _write_rounded(directory: Path, output: Path) -> None:
    """Write a dense checkpoint with its linear layers to NF4 and back, shard by shard."""
    rounded = _quantized_tensors(directory)
    weight_map: dict[str, str] = {}
    for file in track(weight_files(directory), "multiplying out 4 bits"):
        tensors: dict[str, Tensor] = {}
        with safe_open(str(file), framework="pt") as source:
            metadata = source.metadata() or {"format": "pt"}
            for name in source.keys():  # noqa: SIM118
                stored = source.get_tensor(name)
                transposed = rounded.get(name)
                tensors[name] = stored if transposed is None else _rounded(stored, transposed)
        save_file(tensors, str(output / file.name), metadata=metadata)
        weight_map.update(dict.fromkeys(tensors, file.name))
    if len(set(weight_map.values())) > 1:
        write_json(output / _INDEX, {"metadata": {}, "weight_map": weight_map})
    copy_companions(directory, output)
    write_json(output / "config.json", read_config(directory))


def _write_multiplied_out(directory: Path, output: Path) -> None:
    """Write a checkpoint that is stored in 4 bits as a dense one, in the dtype it names."""
    model = load_base_model(directory, dtype="auto", device="cpu")
    state: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        state.update({f"{name}.{leaf}".removeprefix("."): value.detach() for leaf, value in own})
        if is_four_bit(module):
            weight = FourBitWeight(module).read().to(model.dtype)
            transposed = issubclass(vars(module).get("source_cls", nn.Linear), Conv1D)
            state[f"{name}.weight"] = weight.T.contiguous() if transposed else weight
    config = load_config(directory)
    delattr(config, "quantization_config")
    dense = empty_from_config(config)
    dense.load_state_dict(state, strict=False, assign=True)
    dense.tie_weights()
    copy_companions(directory, output)
    with quiet_transformers():
        dense.save_pretrained(output)


def write_requantized(directory: Path, output: Path) -> dict[str, Any]:
    """Store a dense model directory in bitsandbytes' 4-bit layout, tensor by tensor.

    Args:
        directory: the dense model.
        output: an existing, empty directory.

    Returns:
        What is in 4 bits; see `lorakit.models.nf4.Quantization`.
    """
    model = load_base_model(directory, "nf4")
    found = quantization_of(model)
    copy_companions(directory, output)
    with quiet_transformers():
        model.save_pretrained(output)
    return {} if found is None else found.to_json()


@dataclass(frozen=True, slots=True)
class LayerSurvival:
    """What is left of the adapter's change of one layer after quantizing the sum."""

    name: str
    share: float
    relative_error: float
    delta_norm: float


def require_requantizable(directory: Path) -> None:
    """Refuse a model whose 4-bit form cannot be read back; reads no weights.

    Raises:
        RequestError: transformers puts no 4-bit layers in the places of some.
    """
    found = products_of(empty_model(directory))
    if found:
        raise RequestError(
            "transformers could not read this model back in 4 bits",
            where="--requantize",
            expected="layers of the class nn.Linear or Conv1D",
            found=f"{found[0]} and {len(found) - 1} more of a class of their own",
            remedy="leave --requantize out, and load the merged model with quantize='nf4'",
        )


def layer_survivals(plan: MergePlan) -> list[LayerSurvival]:
    """Quantize every changed layer with and without the change, one at a time; writes nothing.

    Args:
        plan: of the dense merge.
    """
    rounded = _quantized_tensors(plan.directory)
    found: list[LayerSurvival] = []
    for name, changes in plan.changes.items():
        transposed = rounded.get(name)
        module = changes[0].module
        if transposed is None or module is None:
            continue
        with safe_open(str(plan.directory / plan.location[name]), framework="pt") as source:
            stored = source.get_tensor(name)
        delta, wanted = changed_value(changes[0], stored, plan.adapter)
        after = _rounded(wanted.to(stored.dtype), transposed, keep=True)
        part = survival(_rounded(stored, transposed, keep=True), after, delta)
        found.append(LayerSurvival(module, **asdict(part)))
    return found


def survival_report(
    layers: list[LayerSurvival], base: Answers, live: Answers, reread: Answers
) -> dict[str, Any]:
    """What requantizing the merged model cost, and what to do about it.

    Args:
        layers: see `layer_survivals`.
        base: what the base answered.
        live: what the live adapter answered.
        reread: what the 4-bit merged model answers.
    """
    parts = [Survival(x.share, x.relative_error, x.delta_norm) for x in layers]
    whole = overall(parts)
    error = _mean_abs(live.outputs, reread.outputs)
    change = _mean_abs(live.outputs, base.outputs)
    return {
        "storage": "nf4",
        "formula": FORMULA,
        "share": None if whole is None else whole.share,
        "relative_error": None if whole is None else whole.relative_error,
        "layers": [asdict(layer) for layer in layers],
        "mean_abs_logit_error": error,
        "max_abs_logit_error": max_abs_difference(live.outputs, reread.outputs),
        "mean_abs_logit_change": change,
        "recommendation": recommendation(error / change),
    }


def recommendation(error: float) -> str:
    """What to do, from the mean logit error in units of what the adapter changes."""
    measured = f"its logits are off by {error:.0%} of what the adapter changes"
    if error <= _KEEPS:
        return f"the 4-bit merged model can take the adapter's place: {measured}"
    if error <= _LOSES:
        return (
            f"evaluate the 4-bit merged model before you use it: {measured}; the adapter unmerged "
            "beside the 4-bit base loses nothing"
        )
    return (
        f"do not use the 4-bit merged model: {measured}; keep the adapter unmerged beside the "
        "4-bit base, or write dense weights (without --requantize)"
    )


def _quantized_tensors(directory: Path) -> dict[str, bool]:
    """Stored names of the weights that are in 4 bits on load -> whether they lie transposed."""
    model = empty_model(directory)
    layers = quantizable(model)
    names = stored_names(directory, model, [f"{name}.weight" for name in layers])
    if names is None:
        raise RequestError(
            "this checkpoint's tensors have other names than the model's parameters",
            where=str(directory),
            expected="names that need no conversion when transformers loads them",
            remedy="load it, save it with save_pretrained, and merge into that; or merge without "
            "--onto and --requantize",
        )
    modules = zip(names, layers.values(), strict=True)
    return {name: isinstance(module, Conv1D) for name, module in modules}


def _rounded(stored: Tensor, transposed: bool, *, keep: bool = False) -> Tensor:
    """To NF4 and back; in float32 where `keep`, else in the stored dtype."""
    value = round_trip(stored.T).T if transposed else round_trip(stored)
    return value if keep else value.to(stored.dtype).contiguous()


def _mean_abs(a: list[Tensor], b: list[Tensor]) -> float:
    total = sum(float((x - y).abs().sum()) for x, y in zip(a, b, strict=True))
    return total / sum(x.numel() for x in a)
