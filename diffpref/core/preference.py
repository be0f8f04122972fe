"""What a reward model minimises: the criterion of PickScore (Kirstain et al., 2023, arXiv:2305.01569, section 4).

    loss = sum_i w_i KL(label_i || softmax(scores_i)) / sum_i w_i,        w_i = 1 / (pairs of the prompt of pair i in the data)

The sums run over all pairs of one optimizer step, on every rank and in every micro-batch. The divergence is the cross-entropy
less the entropy of the label: the gradients are the same, and a perfect model has loss 0 on ties and soft labels too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from diffpref.core.links import logistic


def label_divergence(scores: Tensor, p0: Tensor) -> Tensor:
    """KL(label || softmax(scores)) of each pair in nats, (G,).

    scores: (G, 2), scaled, of image 0 and image 1. p0: (G,) in [0, 1], probability that image 0 is the better one; 0.5 is a tie.
    """
    entropy: Tensor = torch.special.entr(p0) + torch.special.entr(1 - p0)
    return logistic(scores[:, 0] - scores[:, 1], p0) - entropy


def prompt_weights(prompts: Sequence[str]) -> list[float]:
    """One over the number of pairs with the same prompt, (N,): every prompt counts the same, however many pairs it has."""
    counts = Counter(prompts)
    return [1 / counts[prompt] for prompt in prompts]


def loss_share(per_pair: Tensor, weight: Tensor, total_weight: float) -> Tensor:
    """What these pairs contribute to the loss of the global batch: the shares of all micro-batches and ranks add up to it.

    per_pair, weight: (G,). total_weight: sum of the weights over the global batch.
    """
    return (per_pair * (weight / total_weight).to(per_pair.dtype)).sum()


def agreement(scores: Tensor, p0: Tensor) -> Tensor:
    """1 where the image with the higher score is the one that the label prefers, 0 where it is not, 0.5 for a tie of either. (G,)"""
    return 0.5 + 0.5 * torch.sign(scores[:, 0] - scores[:, 1]) * torch.sign(p0 - 0.5)
