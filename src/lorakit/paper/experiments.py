"""The paper's experiments that can be run here: what each is, on what, at which scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import RequestError, nearest
from lorakit.train.yaml import read_mapping

SCALES = ("laptop", "gpu")
CONFIGS = Path(__file__).parent / "configs"
MINILM, SMOLLM2 = "minilm-l6-v2", "smollm2-135m-instruct"

Kind = Literal["latency", "compare", "amplification", "ranks", "seeds"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One comparison that an experiment is made of.

    Attributes:
        config: the name of its file in configs/.
        folder: the data's folder below the user's directory.
        model: the base, for the list.
        tokens: of a row, about; what the estimate of the time is made from.
        num_rows: training rows that there are.
        num_scored: rows or questions of the final score that there are.
    """

    config: str
    folder: str
    model: str
    tokens: int
    num_rows: int
    num_scored: int

    @property
    def file(self) -> Path:
        """The comparison, as `lorakit compare` reads it."""
        return CONFIGS / f"{self.config}.yaml"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of an experiment is run.

    Attributes:
        about: which slice, in one sentence.
        methods: of the comparison; empty: all.
        overrides: "key=value" of the comparison, or of the latency's settings.
    """

    about: str
    methods: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One table or figure of the paper.

    Attributes:
        name: on the command line.
        title: in tables.
        kind: what is done: latency; compare; or, with what a comparison trained, amplification,
            ranks (two ranks' subspaces), seeds (two seeds' subspaces).
        model: the base.
        about: what is measured.
        scales: laptop and gpu.
        parts: the comparisons.
    """

    name: str
    title: str
    kind: Kind
    model: str
    about: str
    scales: Mapping[str, Scale] = field(hash=False)
    parts: tuple[Part, ...] = field(default=())

    @property
    def needs(self) -> tuple[str, ...]:
        """The data files below the user's directory."""
        found: dict[str, None] = {}
        for part in self.parts:
            values = read_mapping(part.file)
            section: Mapping[str, Any] = values["base"]["data"]
            score: Mapping[str, Any] = values.get("eval", {})
            for source in (section["train"], section.get("validation"), score.get("data")):
                if source is not None:
                    found[str(Path(part.folder) / source)] = None
        return tuple(found)


def find(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        RequestError: there is none.
    """
    if name not in EXPERIMENTS:
        close = nearest(name, EXPERIMENTS, n=1)
        raise RequestError(
            f"there is no experiment {name!r}",
            where="the command line",
            expected=f"{', '.join(EXPERIMENTS)}, or all",
            remedy=f"did you mean {close[0]!r}?" if close else "see: lorakit paper list",
        )
    return EXPERIMENTS[name]


def require_scale(name: str) -> str:
    """The name of a scale.

    Raises:
        RequestError: there is none of this name.
    """
    if name not in SCALES:
        raise RequestError(
            f"there is no scale {name!r}", where="--scale", expected=" or ".join(SCALES)
        )
    return name


def _read(file: Path) -> dict[str, Experiment]:
    found = read_mapping(file)
    settings: Mapping[str, Sequence[str]] = found["settings"]

    def scale(given: Mapping[str, Any]) -> Scale:
        overrides = [settings.get(word, (word,)) for word in given.get("overrides", ())]
        return Scale(
            about=given["about"],
            methods=tuple(given.get("methods", ())),
            overrides=tuple(word for words in overrides for word in words),
        )

    experiments: dict[str, Experiment] = {}
    for name, given in found["experiments"].items():
        parts = tuple(
            Part(config=config, **found["data"][data])
            for config, data in given.get("parts", {}).items()
        )
        experiments[name] = Experiment(
            name=name,
            title=given["title"],
            kind=given["kind"],
            model=parts[0].model if parts else given["model"],
            about=given["about"],
            scales={size: scale(given[size]) for size in SCALES},
            parts=parts,
        )
    return experiments


EXPERIMENTS = _read(Path(__file__).with_suffix(".yaml"))
