"""The paper's experiments that can be run here: what each is, on what, at which scale."""

from __future__ import annotations

from collections.abc import Mapping
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


# Tokens of a row (about), training rows, rows that are scored.
_GLUE = {
    "mrpc": (53, 3_668, 408),
    "cola": (11, 8_551, 1_043),
    "stsb": (31, 5_749, 1_500),
    "sst2": (14, 67_349, 872),
}


def _glue(task: str, config: str) -> Part:
    tokens, num_rows, num_scored = _GLUE[task]
    return Part(
        config=config,
        folder="glue",
        model=MINILM,
        tokens=tokens,
        num_rows=num_rows,
        num_scored=num_scored,
    )


def _e2e(config: str) -> Part:
    return Part(
        config=config, folder="", model=SMOLLM2, tokens=102, num_rows=42_061, num_scored=630
    )


_TWO_SEEDS = (
    "seeds=[0, 1]",
    "lr_search.values=[5.0e-4, 2.0e-3]",
    "lr_search.share=0.2",
    "latency.trials=0",
)
_LONG = ("budget.epochs=10", "lr_search.share=0.1", "latency.trials=0")
_WHOLE_E2E = (
    "rows.train=null",
    "rows.validation=500",
    "eval.limit=null",
    "base.train.batch_size=32",
    "base.train.eval_every=400",
    "base.train.save_every=400",
    "latency.trials=0",
)
_SUBSPACES = (_e2e("subspaces"),)
_SUBSPACE_ABOUT = {
    "laptop": "480 E2E rows once (60 steps of 8), two seeds, one rate",
    "gpu": "all 42,061 E2E rows once, two seeds, one rate",
}


def _subspace_scales(*methods: str) -> dict[str, Scale]:
    gpu = ("budget.epochs=1", *_WHOLE_E2E)
    return {
        "laptop": Scale(about=_SUBSPACE_ABOUT["laptop"], methods=methods),
        "gpu": Scale(about=_SUBSPACE_ABOUT["gpu"], methods=methods, overrides=gpu),
    }


_ALL = (
    Experiment(
        name="table1",
        title="Table 1: what an adapter costs in a forward pass",
        kind="latency",
        model="GPT-2 medium's shape, random weights",
        about="one forward pass of LoRA, Adapter-L and Adapter-H over the base's",
        scales={
            "laptop": Scale(
                about="the paper's batches divided by 16 (at least 1), 12 rounds",
                overrides=("divisor=16", "rounds=12"),
            ),
            "gpu": Scale(
                about="the paper's batches and 100 rounds, float32",
                overrides=("divisor=1", "rounds=100", "device=cuda"),
            ),
        },
    ),
    Experiment(
        name="table2",
        title="Table 2: GLUE",
        kind="compare",
        model=MINILM,
        about="full fine-tuning, BitFit, AdapterDrop and LoRA on four tasks",
        parts=tuple(_glue(task, f"glue_{task}") for task in _GLUE),
        scales={
            "laptop": Scale(
                about="MRPC, CoLA, STS-B and 10,000 rows of SST-2; 120 to 250 steps, two seeds, "
                "rates chosen among two (full fine-tuning: three) on held-out training rows",
                methods=("full", "BitFit", "Adapter-D", "LoRA r=8 q,v"),
                overrides=_TWO_SEEDS,
            ),
            "gpu": Scale(
                about="MRPC, CoLA, STS-B and 10,000 rows of SST-2; ten epochs, three seeds, three "
                "rates, nine methods",
                overrides=_LONG,
            ),
        },
    ),
    Experiment(
        name="table3",
        title="Table 3: E2E",
        kind="compare",
        model=SMOLLM2,
        about="full fine-tuning and its rivals on data-to-text: BLEU, NIST, ROUGE-L, CIDEr",
        parts=(_e2e("e2e"),),
        scales={
            "laptop": Scale(
                about="320 training rows once (40 steps of 8), the first 60 meaning "
                "representations of the test split, greedy decoding, raw references, one seed",
                methods=(
                    "full",
                    "FT-Top2",
                    "prefix-layer",
                    "Adapter-H",
                    "Adapter-L",
                    "LoRA r=4 q,v",
                ),
                overrides=(
                    "rows.validation=60",
                    "eval.limit=60",
                    "lr_search.steps=8",
                    "latency.trials=0",
                ),
            ),
            "gpu": Scale(
                about="all 42,061 training rows, 5 epochs, the whole test split (630 meaning "
                "representations), greedy decoding, raw references, one seed",
                methods=("full", "prefix-layer", "Adapter-L", "LoRA r=4 q,v"),
                overrides=("budget.epochs=5", "lr_search.steps=200", *_WHOLE_E2E),
            ),
        },
    ),
    Experiment(
        name="table5",
        title="Table 5: which weights to adapt at an equal budget",
        kind="compare",
        model=MINILM,
        about="seven sets of attention weights, the same number of parameters",
        parts=(_glue("stsb", "weights_stsb"), _glue("sst2", "weights_sst2")),
        scales={
            "laptop": Scale(
                about="STS-B and 10,000 rows of SST-2; 200 and 250 steps, two seeds, two rates",
                overrides=_TWO_SEEDS,
            ),
            "gpu": Scale(
                about="STS-B and 10,000 rows of SST-2; ten epochs, three seeds, three rates",
                overrides=_LONG,
            ),
        },
    ),
    Experiment(
        name="table6",
        title="Table 6: rank 1 to 64 of three sets of weights",
        kind="compare",
        model=MINILM,
        about="q; q and v; q, k, v and o, each at several ranks",
        parts=(_glue("stsb", "ranks_stsb"),),
        scales={
            "laptop": Scale(
                about="STS-B; ranks 1, 4 and 64; 200 steps, two seeds, two rates",
                methods=tuple(f"{w} r={r}" for w in ("q", "q,v", "q,k,v,o") for r in (1, 4, 64)),
                overrides=_TWO_SEEDS,
            ),
            "gpu": Scale(about="STS-B; ten epochs, three seeds, three rates", overrides=_LONG),
        },
    ),
    Experiment(
        name="table7",
        title="Table 7: what the update amplifies",
        kind="amplification",
        model=SMOLLM2,
        about="||U^T W_q V^T|| along the directions of dW, of W and of chance, r=4 and r=64",
        parts=_SUBSPACES,
        scales=_subspace_scales("r=4", "r=64"),
    ),
    Experiment(
        name="table18",
        title="Table 18: rank 1 to 64 on E2E",
        kind="compare",
        model=SMOLLM2,
        about="q and v at several ranks: validation loss, BLEU, NIST, ROUGE-L, CIDEr",
        parts=(_e2e("ranks_e2e"),),
        scales={
            "laptop": Scale(
                about="ranks 1, 2, 4, 16, 64; 320 training rows once (40 steps of 8), the first 60 "
                "meaning representations of the test split, greedy decoding, raw references, one "
                "seed, two rates",
                methods=("r=1", "r=2", "r=4", "r=16", "r=64"),
            ),
            "gpu": Scale(
                about="all 42,061 training rows, 5 epochs, the whole test split, greedy decoding, "
                "raw references, one seed, two rates",
                overrides=("budget.epochs=5", "lr_search.steps=200", *_WHOLE_E2E),
            ),
        },
    ),
    Experiment(
        name="figure2",
        title="Figure 2: score against trained parameters",
        kind="compare",
        model=MINILM,
        about="full fine-tuning, BitFit, prefixes, adapters and LoRA of three sizes each",
        parts=(_glue("mrpc", "sizes_mrpc"),),
        scales={
            "laptop": Scale(
                about="MRPC; 120 steps, two seeds, rates chosen among two (full fine-tuning and "
                "prefixes: three)",
                overrides=_TWO_SEEDS,
            ),
            "gpu": Scale(about="MRPC; ten epochs, three seeds, three rates", overrides=_LONG),
        },
    ),
    Experiment(
        name="figure3",
        title="Figure 3: subspaces of rank 8 and rank 64",
        kind="ranks",
        model=SMOLLM2,
        about="phi(A_8, A_64, i, j) of q and v in every layer",
        parts=_SUBSPACES,
        scales=_subspace_scales("r=8", "r=64"),
    ),
    Experiment(
        name="figure4",
        title="Figure 4: subspaces of two seeds",
        kind="seeds",
        model=SMOLLM2,
        about="phi of two runs of rank 64, of q and v, beside two Gaussian matrices",
        parts=_SUBSPACES,
        scales=_subspace_scales("r=64"),
    ),
)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}
