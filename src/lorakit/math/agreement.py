"""How well predictions agree with labels, as GLUE (Wang et al. 2018) scores its tasks.

Every metric is a function of sums over examples: `class_statistics` and `number_statistics` give
one vector per example, and the functions below map the sum of such vectors, (..., k), to the
metric, (...). Resampling examples is then a matrix product. Where a metric is 0/0 it is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this share of the statistic's size a variance is rounding noise: the side is constant.
_NO_VARIANCE = 1e-10


def class_statistics(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """One vector per example: for each class whether it was hit, predicted, and the label.

    Args:
        predicted: class ids, int64 (n,).
        labels: class ids, int64 (n,).
        num_classes: K.

    Returns:
        float64 (n, 3 K): K hits, K predictions, K labels.
    """
    said = torch.nn.functional.one_hot(predicted, num_classes).double()
    true = torch.nn.functional.one_hot(labels, num_classes).double()
    return torch.cat([said * true, said, true], dim=1)


def accuracy(total: Tensor) -> Tensor:
    """The share of examples whose class is right, from summed `class_statistics`."""
    hits, _, true = _by_class(total)
    return _ratio(hits.sum(-1), true.sum(-1))


def f1(total: Tensor, positive: int = 1) -> Tensor:
    """F1 of one class: 2 TP / (2 TP + FP + FN), from summed `class_statistics`.

    GLUE's MRPC and QQP score the class with id 1, "is a paraphrase".
    """
    hits, said, true = (part[..., positive] for part in _by_class(total))
    return _ratio(2 * hits, said + true)


def macro_f1(total: Tensor) -> Tensor:
    """The mean F1 over the classes that were predicted or are a label at least once."""
    hits, said, true = _by_class(total)
    occurs = (said + true > 0).double()
    return _ratio((_ratio(2 * hits, said + true) * occurs).sum(-1), occurs.sum(-1))


def matthews(total: Tensor) -> Tensor:
    """Matthews correlation, for several classes Gorodkin's R_K, from summed `class_statistics`.

    R_K = (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2)) with c right ones of s,
    p_k predictions and t_k labels of class k; for two classes it is Matthews' (1975) coefficient.
    """
    hits, said, true = _by_class(total)
    s, c = true.sum(-1), hits.sum(-1)
    covariance = c * s - (said * true).sum(-1)
    spread = (s**2 - (said**2).sum(-1)) * (s**2 - (true**2).sum(-1))
    return _ratio(covariance, spread.clamp(min=0).sqrt())


def number_statistics(predicted: Tensor, labels: Tensor) -> Tensor:
    """One vector per example: 1, x, y, x^2, y^2, x y, of the standardised predictions and labels.

    Correlations do not change under a shift or scale; without one, sums of squares lose digits.

    Args:
        predicted: (n,), any floating dtype.
        labels: (n,).

    Returns:
        float64 (n, 6).
    """
    x, y = _standardised(predicted), _standardised(labels)
    return torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)


def rank_statistics(predicted: Tensor, labels: Tensor) -> Tensor:
    """The same of the ranks: `pearson` of their sum is Spearman's rho.

    Ties share the mean of their ranks. Ranks are taken over all examples once, so a resample of
    these vectors approximates the rho of the resampled examples.
    """
    return number_statistics(_ranks(predicted), _ranks(labels))


def pearson(total: Tensor) -> Tensor:
    """Pearson's r from summed `number_statistics`; 0 where one side is constant."""
    n, x, y, xx, yy, xy = total.unbind(-1)
    var_x, var_y = n * xx - x * x, n * yy - y * y
    constant = (var_x <= _NO_VARIANCE * n * n) | (var_y <= _NO_VARIANCE * n * n)
    spread = torch.where(constant, 1.0, var_x * var_y).sqrt()
    return torch.where(constant, 0.0, (n * xy - x * y) / spread).clamp(-1.0, 1.0)


def _by_class(total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hits, said, true = total.unflatten(-1, (3, -1)).unbind(-2)
    return hits, said, true


def _ratio(top: Tensor, bottom: Tensor) -> Tensor:
    return torch.where(bottom > 0, top / torch.where(bottom > 0, bottom, 1.0), 0.0)


def _standardised(values: Tensor) -> Tensor:
    centred = values.double() - values.double().mean()
    scale = centred.square().mean().sqrt()
    # Rounding leaves a constant side with a spread of some 1e-17 times its size.
    flat = bool(scale <= 1e-12 * values.double().abs().max().clamp(min=1e-300))
    return torch.zeros_like(centred) if flat else centred / scale


def _ranks(values: Tensor) -> Tensor:
    """1-based ranks, float64 (n,); ties get their mean."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    mean_rank = counts.cumsum(0).double() - (counts.double() - 1) / 2
    return mean_rank[place]
