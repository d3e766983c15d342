"""What a task must know: its model, its examples, its loss, how validation is scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.data.rows import Rows
from lorakit.methods.base import Method
from lorakit.models.loss_share import LossShare

Inputs = dict[str, Any]
LOSS = "loss"


class ExampleReport(Protocol):
    """What tokenising found, as the run record keeps it."""

    @property
    def num_tokens(self) -> int:
        """Tokens in all examples."""
        ...

    @property
    def longest(self) -> int:
        """Tokens in the longest example."""
        ...

    @property
    def tokenizer_sha256(self) -> str:
        """See `lorakit.data.hashes`."""
        ...

    @property
    def template_sha256(self) -> str | None:
        """See `lorakit.data.hashes`."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, in sentences."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        ...


class ExampleSet(Protocol):
    """The examples of a data set; each has a length and the index of its row."""

    @property
    def report(self) -> ExampleReport:
        """What tokenising found."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Validated:
    """What a validation found.

    Attributes:
        loss: the mean loss, without label smoothing.
        num_items: what it is a mean over: learned tokens, or rows.
        metrics: by name: the task's own (`Objective.metrics`), of which higher is better, and what
            else is worth a look.
    """

    loss: float
    num_items: int
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


class Learner(Protocol):
    """An objective on one model."""

    def loss(self, inputs: Inputs, *, num_items: Tensor | None, label_smoothing: float) -> Tensor:
        """The loss of a batch, a float32 scalar with gradient: summed, divided by `num_items`."""
        ...

    def noted(self) -> dict[str, float]:
        """What the batches since the last call told beside their loss, for the step's line."""
        ...

    def observe(self, batches: Iterable[Inputs]) -> Any:
        """What `conclude` needs of these rows; called in eval mode and without gradient.

        It can be pickled, so that processes can each look at a share of the rows.
        """
        ...

    def conclude(self, observed: Sequence[Any]) -> Validated:
        """Loss and metrics over all rows that were observed."""
        ...


class GroupLearner(Learner, Protocol):
    """An objective whose rows do not depend on each other, so that runs can share a batch."""

    def losses(self, inputs: Inputs, shares: Sequence[LossShare]) -> list[Tensor]:
        """The loss of each share's rows, float32 scalars with gradient, from one forward pass."""
        ...


class Objective(Protocol):
    """What is learned."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that validation computes beside the loss."""
        ...

    @property
    def best(self) -> str:
        """What chooses the best validation unless the config says: "loss", or a metric."""
        ...

    @property
    def unit(self) -> str:
        """What the loss is a mean over: "tokens" or "rows"."""
        ...

    @property
    def rows_each(self) -> int:
        """How many rows of the model's an example becomes at most, each as long as it is."""
        ...

    def empty_model(self) -> PreTrainedModel:
        """The model on the meta device.

        Raises:
            ModelError: the base cannot do this task.
        """
        ...

    def load_model(self, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        """The model with its weights, ready for the method; device None: where a run computes."""
        ...

    def beside(self, model: nn.Module) -> tuple[str, ...]:
        """Modules that start at random and are trained whatever the method trains."""
        ...

    def build(self, rows: Rows, *, label: str) -> ExampleSet:
        """Rows to examples; `label` is the progress bar's.

        Raises:
            DataError: a row that does not fit.
        """
        ...

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Examples to a batch."""
        ...

    def num_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How much of the mean loss a batch is: int64 scalar."""
        ...

    def most_labels(self, examples: ExampleSet, num_rows: int) -> int:
        """The most positions of a batch whose logits over the vocabulary are computed."""
        ...

    def line(self, examples: ExampleSet) -> str:
        """The examples in a few words."""
        ...

    def facts(self) -> dict[str, Any]:
        """What the passport says of the task."""
        ...

    def with_model(
        self, examples: ExampleSet, model: PreTrainedModel, method: Method, facts: dict[str, Any]
    ) -> ExampleSet:
        """The examples with what only the loaded model can tell of them.

        Args:
            examples: as `build` made them.
            model: with the method attached.
            method: what is trained of it.
            facts: plain values that name the base and the arithmetic.
        """
        ...

    def bind(self, model: PreTrainedModel, method: Method, *, fresh: bool) -> Learner:
        """The objective on this model.

        Args:
            model: with the method attached.
            method: what is trained of it.
            fresh: whether training begins here, and does not go on from a checkpoint.
        """
        ...
