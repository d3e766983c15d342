"""Where A and B can start: from the weight's own directions, or from data.

All take and give plain matrices: a weight or gradient (out, in), A (r, in), B (out, r).
"""

from __future__ import annotations

import torch
from torch import Tensor

_NUM_ITERATIONS = 4
_LORA_GA_GAMMA = 16.0


def pissa(weight: Tensor, r: int, scaling: float, *, fast: bool = False) -> tuple[Tensor, Tensor]:
    """PiSSA: s B A is the best rank-r approximation of W (Meng et al. 2024, arXiv 2404.02948).

    W = U S V^T; B = U_r (S_r / s)^(1/2), A = (S_r / s)^(1/2) V_r^T.

    Args:
        weight: W, (out, in).
        r: the rank, at most min(out, in).
        scaling: s.
        fast: a randomized SVD (Halko et al. 2011) of four power iterations, which draws from the
            random state, in place of the exact one.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if fast:
        left, values, right = leading_directions(wide, r)
    else:
        left, values, rows = torch.linalg.svd(wide, full_matrices=False)
        right = rows.T
    root = (values[:r] / scaling).sqrt()
    return root[:, None] * right[:, :r].T, left[:, :r] * root


def olora(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """OLoRA: the first r columns of Q and rows of R, W = Q R (Büyükakyüz 2024, arXiv 2406.01775).

    Args:
        weight: W, (out, in).
        r: the rank, at most min(out, in).
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    orthogonal, triangle = torch.linalg.qr(wide)
    return triangle[:r].contiguous(), orthogonal[:, :r].contiguous()


def lora_ga(gradient: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """LoRA-GA: B A moves first as full fine-tuning would (Wang et al. 2024, arXiv 2407.05000).

    G = U S V^T; A = c V_[1..r]^T, B = c U_[r+1..2r] with c = out^(1/4) / gamma^(1/2), gamma = 16.

    Args:
        gradient: G of the loss with respect to W, (out, in).
        r: the rank; 2 r is at most min(out, in).
    """
    left, _, right = leading_directions(gradient, 2 * r)
    c = gradient.shape[0] ** 0.25 / _LORA_GA_GAMMA**0.5
    return c * right[:, :r].T, c * left[:, r : 2 * r]


def leading_directions(matrix: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `num` leading U, S and V of a matrix by randomized SVD, oversampled twofold.

    Args:
        matrix: (m, n); the random state is drawn from.
        num: at most min(m, n).

    Returns:
        (m, num), (num,), (n, num).
    """
    size = min(2 * num, *matrix.shape)
    left, values, right = torch.svd_lowrank(matrix, q=size, niter=_NUM_ITERATIONS)
    return left[:, :num], values[:num], right[:, :num]


class InputSketch:
    """The leading right singular vectors of all inputs seen: EVA's incremental SVD.

    Paischer et al. 2024, arXiv 2410.07170; the inputs are not centred.

    Args:
        num: directions wanted; four times as many are carried along.
    """

    def __init__(self, num: int) -> None:
        self.num = num
        self._scaled: Tensor | None = None  # S V^T of what was seen, (at most 4 num, in)

    def add(self, inputs: Tensor) -> None:
        """Take in one batch of inputs, (n, in)."""
        wide = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
        stacked = wide if self._scaled is None else torch.cat([self._scaled, wide])
        size = min(4 * self.num, *stacked.shape)
        _, values, right = torch.svd_lowrank(stacked, q=size, niter=_NUM_ITERATIONS)
        self._scaled = values[:, None] * right.T

    def singular_values(self) -> Tensor | None:
        """Estimates of the leading singular values of all inputs seen, descending; None if none."""
        return None if self._scaled is None else self._scaled.norm(dim=1)[: self.num]

    def directions(self) -> Tensor | None:
        """A = V_r^T, (num, in), orthonormal rows; None where the inputs span fewer directions."""
        if self._scaled is None or self._scaled.shape[0] < self.num:
            return None
        strength = self._scaled.norm(dim=1)
        if strength[self.num - 1] <= 1e-6 * strength[0]:
            return None
        return self._scaled[: self.num] / strength[: self.num, None]
