"""From adapters on disk to one adapter on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters.bind import plan_binding
from lorakit.adapters.composition.beside import beside_needs_base
from lorakit.adapters.composition.compose import Composition, compose_parts
from lorakit.adapters.composition.identity import require_common_base, require_common_classes
from lorakit.adapters.composition.prediction import Prediction, SitePair, predict_interference
from lorakit.adapters.composition.recipe import Part, Recipe, check_parts, is_identity
from lorakit.adapters.composition.tokens import tokens_need_base
from lorakit.composing.measure import BASE, COMPOSED, PartTask, measure_tasks
from lorakit.composing.tune import Tuned, require_tunable, tune_weights
from lorakit.data.options import SftOptions
from lorakit.data.rows import Rows
from lorakit.data.sft import build_examples
from lorakit.data.task_facts import saved_task
from lorakit.errors import AdapterFileError, RequestError
from lorakit.files import require_free
from lorakit.formats.peft import read_adapter, write_adapter
from lorakit.methods.files import read_saved
from lorakit.methods.lora import LoraMethod
from lorakit.models.load import load_base_model, load_tokenizer

_NUM_WORST = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """A search for weights.

    Attributes:
        rows: the validation rows.
        sft: how they are read.
        max_trials: compositions that are tried at most.
        batch_size: rows per forward pass.

    Raises:
        RequestError: a batch of no rows.
    """

    rows: Rows
    sft: SftOptions
    max_trials: int = 24
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RequestError(
                "batch_size is out of range",
                where="batch_size",
                expected="at least 1",
                found=str(self.batch_size),
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ComposeRequest:
    """What to compose.

    Attributes:
        parts: see `read_parts`.
        recipe: how.
        output: the directory to write; must be free.
        base: the base model; None for the one the parts name. Loaded only where it is needed.
        tuning: choose the weights, or None.
        tasks: the parts' own data, measured before and after.
        dtype, device: how the base is loaded.
    """

    parts: Sequence[Part]
    recipe: Recipe
    output: Path
    base: str | None = None
    tuning: Tuning | None = None
    tasks: Sequence[PartTask] = ()
    dtype: str | None = None
    device: str | None = None


def read_parts(paths: Sequence[Path], weights: Sequence[float]) -> list[Part]:
    """Read adapters and give each a name: its directory's, or that of its run.

    Raises:
        AdapterFileError: there is no adapter, it cannot be read, or it is of another method.
    """
    names: list[str] = []
    parts: list[Part] = []
    for path, weight in zip(paths, weights, strict=True):
        saved = read_saved(path)
        if saved.name != LoraMethod.name:
            raise AdapterFileError(
                "only low-rank adapters can be composed: there is no sum of two of these",
                where=str(path),
                expected="method lora",
                found=f"method {saved.name}",
            )
        name = _name(path)
        names.append(name)
        if names.count(name) > 1:
            name = f"{name}-{names.count(name)}"
        parts.append(Part(name, read_adapter(path), weight))
    return parts


def _name(path: Path) -> str:
    resolved = path.resolve()
    name = resolved.parent.name if resolved.name in ("adapter", "checkpoint") else resolved.name
    kept = "".join(c if c.isalnum() or c in "_-." else "-" for c in name).lstrip("_-.")
    return f"{kept}-part" if kept in ("", BASE, COMPOSED) else kept


def compose_to_disk(request: ComposeRequest) -> dict[str, Any]:
    """Predict, choose weights, compose, measure, and write an adapter in PEFT's layout.

    Everything that can be refused is refused before the base is loaded, and the directory appears
    whole or not at all.

    Returns:
        Plain values: the prediction, the search, the errors, the measurements.

    Raises:
        SpecError, BaseMismatchError, AdapterFileError: see `compose`.
        RequestError: the base is needed and nobody names it.
        OutputError: the output is taken.
    """
    require_free(request.output)
    parts, recipe = list(request.parts), request.recipe
    used = check_parts(parts, recipe)
    if request.tuning is not None or request.tasks:
        used = parts
    require_common_classes(used)
    if not recipe.any_base:
        require_common_base(used, None)
    if request.tuning is not None:
        require_tunable(parts, recipe, request.tuning.max_trials)
    model, tokenizer = _base_for(request)
    if model is not None:
        _require_base(used, model, any_base=recipe.any_base)
    examples = []
    if request.tuning is not None and model is not None and tokenizer is not None:
        tuning = request.tuning
        examples = list(build_examples(tuning.rows, tokenizer, tuning.sft))
    predictions, pairs = predict_interference(parts, recipe, base=model)
    tuned: Tuned | None = None
    if request.tuning is not None and model is not None:
        tuned = tune_weights(
            model,
            parts,
            recipe,
            examples,
            max_trials=request.tuning.max_trials,
            batch_size=request.tuning.batch_size,
        )
        parts = [replace(p, weight=w) for p, w in zip(parts, tuned.weights, strict=True)]
        _require_better_than_base(tuned)
    made = compose_parts(parts, recipe, base=model)
    measured: list[dict[str, Any]] = []
    if request.tasks and model is not None and tokenizer is not None:
        measured = measure_tasks(model, tokenizer, parts, made.adapter, request.tasks)
    record = _record(made, predictions, pairs, tuned, measured)
    _write(made, record, request.output)
    return {"output": str(request.output), **record}


def _require_base(parts: Sequence[Part], model: PreTrainedModel, *, any_base: bool) -> None:
    """Refuse a base that the parts are not of, before rows are read with its tokenizer."""
    if not any_base:
        require_common_base(parts, model)
    for part in parts:
        plan_binding(model, part.adapter)


def _require_better_than_base(tuned: Tuned) -> None:
    if not any(tuned.weights):
        raise RequestError(
            "the base alone is best on these rows: no weights of these adapters help",
            where="tune",
            found=f"perplexity {tuned.base:.4g} of the base; the parts alone "
            + ", ".join(f"{name} {value:.4g}" for name, value in tuned.alone.items()),
            remedy="check that the rows are of a task that a part was trained on",
        )


def _base_for(
    request: ComposeRequest,
) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase | None]:
    """The base and its tokenizer, where something needs them."""
    asks = request.tuning is not None or bool(request.tasks)
    if not asks and request.base is None and not _needs_base(request.parts, request.recipe):
        return None, None
    if asks:
        _refuse_classifiers(request.parts)
    ref = request.base or _named_base(request.parts)
    # Sums are taken in the weights as they are stored; answers in what the device likes.
    dtype = request.dtype or (None if asks else "auto")
    tokenizer = load_tokenizer(ref) if asks else None
    return load_base_model(ref, dtype=dtype, device=request.device), tokenizer


def _needs_base(parts: Sequence[Part], recipe: Recipe) -> bool:
    """DoRA, and what is replaced with weights that leave something of the base's own."""
    counting = check_parts(parts, recipe)
    if is_identity(counting, recipe):
        return False
    dora = any(part.adapter.spec.update == "dora" for part in counting)
    return dora or beside_needs_base(counting) or tokens_need_base(counting)


def _refuse_classifiers(parts: Sequence[Part]) -> None:
    for part in parts:
        in_passport = saved_task(part.adapter.passport, where=part.name) is not None
        if in_passport or part.adapter.config.get("task_type") == "SEQ_CLS":
            raise RequestError(
                "weights are tuned and tasks measured for adapters that write text",
                where=part.name,
                found="an adapter trained with task: classify",
                remedy="compose without --tune and --measure, then: lorakit eval",
            )


def _named_base(parts: Sequence[Part]) -> str:
    names = {part.name: part.adapter.config.get("base_model_name_or_path") for part in parts}
    known = sorted({str(name) for name in names.values() if name})
    if len(known) != 1:
        raise RequestError(
            "the base is needed, and the parts do not name one",
            where="the command line",
            found=", ".join(f"{part}: {name or 'none'}" for part, name in names.items()),
            remedy="name it: --base REF",
        )
    return known[0]


def _record(
    made: Composition,
    predictions: Sequence[Prediction],
    pairs: Sequence[SitePair],
    tuned: Tuned | None,
    measured: list[dict[str, Any]],
) -> dict[str, Any]:
    worst = sorted(pairs, key=lambda pair: -pair.found.sign_conflict * pair.found.strength)
    return {
        **made.adapter.passport["composition"],
        "num_params": made.adapter.num_params(),
        "predicted": [prediction.to_json() for prediction in predictions],
        "predicted_worst_sites": [pair.to_json() for pair in worst[:_NUM_WORST]],
        "tuned": None if tuned is None else tuned.to_json(),
        "measured": measured,
    }


def _write(made: Composition, record: dict[str, Any], output: Path) -> None:
    passport = {**made.adapter.passport, "composition": record}
    adapter = replace(made.adapter, passport=passport)
    write_adapter(adapter, output)
