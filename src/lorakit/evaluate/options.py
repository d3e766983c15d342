"""What to measure: the metrics there are, and the options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lorakit.data.options import SftOptions
from lorakit.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric is.

    Attributes:
        needs: what the model has to do for it: score given answers, write answers, or score
            each of a row's choices.
        higher_is_better: False for perplexity.
        about: what exactly is computed.
    """

    needs: Literal["likelihood", "answers", "choices"]
    higher_is_better: bool
    about: str


METRICS: dict[str, Metric] = {
    "perplexity": Metric(
        "likelihood", False, "exp of the mean negative log-likelihood of the answers' tokens"
    ),
    "exact_match": Metric(
        "answers", True, "share of answers equal to a reference, whitespace squeezed"
    ),
    "token_f1": Metric(
        "answers", True, "mean F1 of the words shared with the best reference, as SQuAD counts them"
    ),
    "sql_execution": Metric(
        "answers", True, "share of queries that return a reference query's rows from the database"
    ),
    "choice": Metric("choices", True, "share of rows whose right choice is the most likely one"),
    "bleu": Metric(
        "answers", True, "corpus BLEU-4, lower-cased, mteval-v13a tokens, all references"
    ),
    "rouge_l": Metric(
        "answers", True, "mean ROUGE-L, F with beta 1.2, all references, as the E2E script's"
    ),
    "nist": Metric(
        "answers", True, "corpus NIST-5, lower-cased, mteval-v13a tokens, all references"
    ),
    "cider": Metric(
        "answers", True, "mean CIDEr-D, 0 to 10, idf of the references at hand, ROUGE-L's tokens"
    ),
}

# Those that score one written answer by itself, whatever the others are.
SINGLE_METRICS = ("sql_execution", "exact_match", "token_f1", "rouge_l")
_CORPUS_METRICS = frozenset({"bleu", "rouge_l", "nist", "cider"})


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to measure, and how.

    Raises:
        ConfigError: an unknown metric, or a value out of range.
    """

    metrics: tuple[str, ...] = field(
        default=("perplexity", "exact_match", "token_f1"),
        metadata=_help(f"what to measure: {', '.join(METRICS)}"),
    )
    max_new_tokens: int = field(default=128, metadata=_help("the longest answer, in tokens"))
    batch_size: int = field(default=16, metadata=_help("rows per forward pass"))
    limit: int | None = field(
        default=None, metadata=_help("only the first so many questions; null: all")
    )
    seed: int = field(default=0, metadata=_help("of the resampling behind intervals and p-values"))
    group_by_prompt: bool | None = field(
        default=None,
        metadata=_help(
            "rows with the same prompt are one question with several references; "
            "null: only if bleu, rouge_l, nist or cider is measured"
        ),
    )
    choice_normalisation: Literal["none", "tokens"] = field(
        default="none",
        metadata=_help(
            "none: compare log p(choice); tokens: log p(choice) / its tokens, which does not "
            "favour short choices"
        ),
    )
    sft: SftOptions = field(
        default_factory=SftOptions, metadata=_help("columns and template, as in training")
    )

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ConfigError(
                "no metric is asked for", where="metrics", expected=f"some of {', '.join(METRICS)}"
            )
        for name in self.metrics:
            if name not in METRICS:
                close = nearest(name, METRICS)
                raise ConfigError(
                    f"unknown metric {name!r}",
                    where="metrics",
                    expected=", ".join(METRICS),
                    remedy=f"did you mean {' or '.join(close)}?" if close else None,
                )
        counts = (
            ("max_new_tokens", self.max_new_tokens),
            ("batch_size", self.batch_size),
            ("limit", self.limit),
        )
        for name, value in counts:
            if value is not None and value < 1:
                raise ConfigError(
                    f"{name} is out of range", where=name, expected="at least 1", found=str(value)
                )
        if self.choice_normalisation not in ("none", "tokens"):
            raise ConfigError(
                "unknown value of choice_normalisation",
                where="choice_normalisation",
                expected="none, tokens",
                found=repr(self.choice_normalisation),
            )

    @property
    def grouped(self) -> bool:
        """Whether rows with the same prompt are one question."""
        if self.group_by_prompt is not None:
            return self.group_by_prompt
        return bool(_CORPUS_METRICS.intersection(self.metrics))

    def needs(self, what: Literal["likelihood", "answers", "choices"]) -> tuple[str, ...]:
        """The metrics asked for that need this of the model."""
        return tuple(name for name in dict.fromkeys(self.metrics) if METRICS[name].needs == what)
