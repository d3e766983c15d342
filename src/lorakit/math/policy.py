"""What a policy gradient over groups of answers is made of.

Shao et al. 2024 (GRPO, arXiv 2402.03300), section 4.1; Liu et al. 2025 (Dr. GRPO, arXiv
2503.20783), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the standard deviation of a group's rewards.
STD_EPS = 1e-4


def group_advantages(rewards: Tensor, *, scale: bool) -> Tensor:
    """(r - mean) / (std + 1e-4) within each group, or r - mean.

    Args:
        rewards: (groups, answers), at least two answers.
        scale: divide by the standard deviation (with n - 1); False is Dr. GRPO.

    Returns:
        (groups, answers); exactly 0 in a group whose rewards are all equal.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale:
        centred = centred / (rewards.std(1, keepdim=True) + STD_EPS)
    # The mean of equal numbers may be one rounding beside them.
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return centred.masked_fill(equal, 0.0)


def k3_divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """exp(ref - pi) - (ref - pi) - 1 of each token, an estimate of KL(policy || reference).

    Never negative, and without bias where the tokens are samples of the policy (Schulman 2020;
    eq. 4 of GRPO).

    Args:
        policy: (n,) log-probabilities of sampled tokens, with gradient.
        reference: (n,) the same under the reference.
    """
    ratio = reference - policy
    return torch.expm1(ratio) - ratio
