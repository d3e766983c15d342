"""Where special positions stand among the tokens of a batch, row by row.

Hu et al. 2021, section 5.1: a prefix stands in front of the prompt, an infix behind it (behind the
context, in front of what is learned or written). Padding may be on either side, so each row has
its own columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """How many special positions there are, and of what kind the model is.

    Attributes:
        num_prefix: positions in front of the prompt (l_p).
        num_infix: positions behind the prompt (l_i).
        causal: the model is a decoder. There the prefix is in front of the first token, and what
            follows the prompt is predicted at the last infix position. In an encoder the prefix
            stands behind the first token, so that position 0 is still the token that classifiers
            read, and each token keeps its own output.
    """

    num_prefix: int
    num_infix: int
    causal: bool

    @property
    def num_special(self) -> int:
        """Positions that every row gets in addition to its tokens."""
        return self.num_prefix + self.num_infix


@dataclass(frozen=True, slots=True)
class Placement:
    """The columns of one batch, all int64; T tokens and n special positions make T + n columns.

    Attributes:
        tokens: (batch, T) the column of each of the caller's tokens, padding included.
        special: (batch, n) the column of each special position, prefix first.
        outputs: (batch, T) the column whose output the caller sees at each token.
        neighbours: (batch, n) the token (0 to T - 1) whose segment a special position shares.
        mask: (batch, T + n) 1 where there is a token or a special position.
        unpadded: the caller gave no mask, so every position is real.
    """

    tokens: Tensor
    special: Tensor
    outputs: Tensor
    neighbours: Tensor
    mask: Tensor
    unpadded: bool

    @property
    def num_tokens(self) -> int:
        """T, the width of the caller's batch."""
        return self.tokens.shape[1]

    @property
    def width(self) -> int:
        """T + n, the width the model sees."""
        return self.mask.shape[1]

    def spread(self, tokens: Tensor, special: Tensor) -> Tensor:
        """Values (batch, T, ...) and (batch, n, ...) in their columns, (batch, T + n, ...)."""
        spread = tokens.new_zeros((tokens.shape[0], self.width, *tokens.shape[2:]))
        spread = spread.scatter(1, _index(self.tokens, tokens), tokens)
        return self.replace(spread, special)

    def replace(self, values: Tensor, special: Tensor) -> Tensor:
        """A copy of (batch, T + n, ...) with (batch, n, ...) at the special columns."""
        return values.scatter(1, _index(self.special, special), special.to(values.dtype))

    def collect(self, values: Tensor) -> Tensor:
        """What the caller sees of (batch, T + n, ...) outputs: (batch, T, ...)."""
        index = self.outputs.to(values.device)
        index = index.view(*index.shape, *[1] * (values.dim() - 2))
        return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


def place(mask: Tensor, ends: Tensor | None, shape: Shape, *, unpadded: bool) -> Placement:
    """Put the special positions of each row in their place.

    Args:
        mask: (batch, T), nonzero where there is a token.
        ends: (batch,) the column behind each row's prompt, or None: behind its last token.
        shape: how many, and of what kind.
        unpadded: the caller gave no mask.
    """
    real = mask != 0
    num_tokens = real.shape[1]
    columns = torch.arange(num_tokens, device=mask.device)[None]
    start, stop = first_token(real), end_of_tokens(real)
    begin = start if shape.causal else torch.minimum(start + 1, stop)
    end = stop if ends is None else torch.minimum(ends.to(stop), stop)
    end = torch.maximum(end, begin)[:, None]
    begin = begin[:, None]
    tokens = columns + shape.num_prefix * (columns >= begin) + shape.num_infix * (columns >= end)
    prefix = begin + torch.arange(shape.num_prefix, device=mask.device)
    infix = end + shape.num_prefix + torch.arange(shape.num_infix, device=mask.device)
    special = torch.cat([prefix, infix], dim=1)
    outputs = tokens
    if shape.causal and shape.num_infix:
        # The token behind the prompt is predicted at the last infix position.
        outputs = torch.where(columns == end - 1, infix[:, -1:], tokens)
    neighbours = torch.cat([begin.expand_as(prefix), end.expand_as(infix)], dim=1) - 1
    whole = mask.new_ones((len(mask), num_tokens + shape.num_special)).scatter(1, tokens, mask)
    return Placement(
        tokens=tokens,
        special=special,
        outputs=outputs,
        neighbours=torch.maximum(neighbours, start[:, None]).clamp(max=num_tokens - 1),
        mask=whole,
        unpadded=unpadded,
    )


def first_token(real: Tensor) -> Tensor:
    """(batch,) the column of each row's first token; 0 in a row without any."""
    return real.int().argmax(dim=1)


def end_of_tokens(real: Tensor) -> Tensor:
    """(batch,) the column behind each row's last token; the width in a row without any."""
    return real.shape[1] - real.int().flip(1).argmax(dim=1)


def ends_of_prompts(labels: Tensor, ignored: int) -> Tensor:
    """(batch,) the column of each row's first label; the width in a row without any.

    Args:
        labels: (batch, T) int64.
        ignored: the label of tokens that are not learned.
    """
    learned = labels != ignored
    return torch.where(learned.any(dim=1), learned.int().argmax(dim=1), labels.shape[1])


def _index(columns: Tensor, values: Tensor) -> Tensor:
    index = columns.to(values.device).view(*columns.shape, *[1] * (values.dim() - 2))
    return index.expand(-1, -1, *values.shape[2:])
