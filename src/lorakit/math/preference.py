"""Losses of preference tuning, from log-probabilities of whole answers.

Every function takes and gives tensors (n,) of any floating dtype, with gradient, in nats; `beta` is
how strongly the policy is held to the reference.

- DPO, the sigmoid loss with flipped labels ("conservative"): Rafailov et al. 2023, eq. 7, and
  Mitchell 2023.
- IPO: Azar et al. 2023, eq. 17.
- ORPO: Hong et al. 2024, eqs. 6 and 7.
- KTO: Ethayarajh et al. 2024, eqs. 7 and 8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_KL_ROWS = 64


def dpo_losses(
    chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """-(1 - e) log s(beta d) - e log s(-beta d), with d = chosen_ratio - rejected_ratio.

    Args:
        chosen_ratio: (n,) log-probability of the chosen answer under the policy, less the one under
            the reference.
        rejected_ratio: (n,) the same of the rejected answer.
        beta: see the module.
        label_smoothing: e, the share of pairs whose labels are taken to be wrong; below 0.5.

    Returns:
        (n,); log 2 where policy and reference are one.
    """
    logits = beta * (chosen_ratio - rejected_ratio)
    right = -F.logsigmoid(logits)
    if not label_smoothing:
        return right
    return (1 - label_smoothing) * right - label_smoothing * F.logsigmoid(-logits)


def ipo_losses(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float) -> Tensor:
    """(chosen_ratio - rejected_ratio - 1 / (2 beta))^2.

    Args:
        chosen_ratio: (n,) as in `dpo_losses`, but a mean over the answer's tokens, so that long
            answers do not weigh more.
        rejected_ratio: (n,) the same of the rejected answer.
        beta: see the module.
    """
    return (chosen_ratio - rejected_ratio - 1 / (2 * beta)) ** 2


def orpo_penalties(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log s(log odds(chosen) - log odds(rejected)); added to the chosen answer's own loss.

    Args:
        chosen: (n,) mean log-probability per token of the chosen answer, below 0.
        rejected: (n,) the same of the rejected answer.
    """
    return -F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p, without leaving the range where p is near 1."""
    below_one = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    return logp - torch.log(-torch.expm1(below_one))


def kto_losses(ratio: Tensor, desirable: Tensor, kl: Tensor, *, beta: float) -> Tensor:
    """1 - s(beta (ratio - kl)) of a desirable answer, 1 - s(beta (kl - ratio)) of another.

    Args:
        ratio: (n,) as in `dpo_losses`.
        desirable: (n,) bool.
        kl: scalar >= 0 without gradient, an estimate of the policy's distance from the reference.
        beta: see the module.
    """
    distance = beta * (ratio - kl)
    return 1 - torch.sigmoid(torch.where(desirable, distance, -distance))


def token_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) of the next token, (n,) float32 in nats, exact.

    Args:
        policy: (n, vocabulary) logits.
        reference: (n, vocabulary) logits at the same places.
    """
    # A few rows at a time: the distributions are as large as the logits themselves.
    parts = zip(policy.split(_KL_ROWS), reference.split(_KL_ROWS), strict=True)
    found = [_kl(one.float().log_softmax(-1), two.float().log_softmax(-1)) for one, two in parts]
    return torch.cat(found) if found else policy.new_zeros(0)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum(-1)
