"""The comparison behind an experiment, at a scale, in a directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.compare.config import CompareConfig
from lorakit.compare.run import compare
from lorakit.errors import DataError, RequestError, WorkError, nearest
from lorakit.paper.experiments import Experiment, Part, Scale
from lorakit.train.run import Say

COMPARISONS = "comparisons"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a call asks for.

    Attributes:
        experiment: which.
        scale: laptop or gpu.
        data: the directory of the data; None for an experiment that reads none.
        output: the directory of all results.
        overrides: "key=value" of the comparison, or of the latency's settings.
        only: names of methods; empty: all of the scale.
    """

    experiment: Experiment
    scale: str
    data: Path | None
    output: Path
    overrides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def chosen(self) -> Scale:
        """The experiment's scale, with the methods that are asked for."""
        scale = self.experiment.scales[self.scale]
        return replace(scale, methods=self.only) if self.only else scale


def comparison(part: Part, scale: Scale, overrides: Iterable[str] = ()) -> CompareConfig:
    """The comparison of a part at a scale; pure but for reading its file.

    Raises:
        ConfigError: an override that does not fit.
        RequestError: a method that the comparison does not have.
    """
    config = CompareConfig.from_yaml(part.file, [*scale.overrides, *overrides])
    if not scale.methods:
        return config
    names = [method["name"] for method in config.methods]
    for wanted in scale.methods:
        if wanted not in names:
            close = nearest(wanted, names, n=1)
            raise RequestError(
                f"there is no method named {wanted!r} in this experiment",
                where="--only",
                expected=", ".join(names),
                remedy=f"did you mean {close[0]!r}?" if close else None,
            )
    kept = tuple(method for method in config.methods if method["name"] in scale.methods)
    return replace(config, methods=kept)


def config_of(part: Part, request: Request) -> CompareConfig:
    """The comparison of a part with the places of a request."""
    data = (request.data or Path()) / part.folder
    output = request.output / COMPARISONS / part.config
    places = [f"data={json.dumps(str(data))}", f"output={json.dumps(str(output))}"]
    return comparison(part, request.chosen, [*request.overrides, *places])


def require_data(request: Request) -> None:
    """Refuse a directory that lacks a file of the experiment, before anything is run.

    Raises:
        DataError: no directory is given, it does not exist, or files are missing.
    """
    needs = request.experiment.needs
    if not needs:
        return
    shape = "a directory with " + ", ".join(needs)
    if request.data is None:
        raise DataError(
            f"{request.experiment.name} needs data",
            where="--data",
            expected=shape,
            remedy="name it: --data DIR; docs/paper.md says where the data sets come from",
        )
    if not request.data.is_dir():
        raise DataError(
            "the data directory does not exist", where=str(request.data), expected=shape
        )
    missing = [name for name in needs if not (request.data / name).is_file()]
    if missing:
        raise DataError(
            f"the data directory lacks files that {request.experiment.name} reads",
            where=str(request.data),
            expected=shape,
            found=f"missing: {', '.join(missing)}",
            remedy="docs/paper.md says where the data sets come from",
        )


def run_comparisons(request: Request, say: Say) -> dict[str, dict[str, Any]]:
    """Run every comparison of an experiment; finished cells are not run again.

    Returns:
        Name of the comparison -> what its compare.json says.

    Raises:
        RequestError, WorkError, TrainingPaused: as `compare`.
    """
    found: dict[str, dict[str, Any]] = {}
    for part in request.experiment.parts:
        say(f"{request.experiment.name}: {part.config}")
        found[part.config] = compare(config_of(part, request), say=say).document
    return found


def weights_of(request: Request, documents: Mapping[str, Any], arm: str, seed: int) -> Path:
    """The adapter that a final run of one method left.

    Raises:
        WorkError: the run failed.
    """
    (part,) = request.experiment.parts
    output = config_of(part, request).output
    for cell in documents[part.config]["cells"]:
        if (cell["arm"], cell["kind"], cell["seed"]) == (arm, "final", seed):
            if cell["failed"]:
                break
            return Path(output) / "cells" / cell["cell"] / "adapter"
    raise WorkError(
        "a run that is to be looked at did not finish",
        where=f"{output}, {arm}, seed {seed}",
        remedy="see its log; run the command again",
    )


def seeds_of(documents: Mapping[str, Any]) -> Sequence[int]:
    """The seeds of the comparisons."""
    return sorted({seed for found in documents.values() for seed in found["config"]["seeds"]})
