"""Links: from the logit of a pair to its loss. Pure functions of (G,) tensors; methods compose them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def logistic(logit: Tensor, probability: Tensor) -> Tensor:
    """Cross-entropy of the label: -p log sigmoid(z) - (1 - p) log sigmoid(-z).

    logit: (G,), reward of the chosen minus that of the rejected image. probability: (G,) in [0, 1] that the chosen image
    is the better one; 1 is a certain label, 0.5 a tie. Returns (G,). Minimal at z = log(p / (1 - p)).
    """
    return -probability * F.logsigmoid(logit) - (1 - probability) * F.logsigmoid(-logit)
