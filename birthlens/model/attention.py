"""What attention makes of its scores: a softmax over the past, or weights that need not sum to one.

    softmax    exp(score_ts) / sum over s' <= t of exp(score_ts')
    relu       max(score_ts, 0) / (t + 1)          positions from 0
    linear     score_ts / (t + 1)

ReLU attention as in Guo et al. 2024 (arXiv 2410.13835).
"""

from __future__ import annotations

import torch
from torch import Tensor

from birthlens.config.model import ModelConfig
from birthlens.shapes import Float


def attention_pattern(
    config: ModelConfig, scores: Float[Tensor, "*batch query_pos key_pos"]
) -> Float[Tensor, "*batch query_pos key_pos"]:
    """Return the weight of every key for every query of a whole sequence; later keys have none, whatever their scores.

    Example:
        >>> rectified = ModelConfig(family="full", attention="relu")
        >>> attention_pattern(rectified, torch.tensor([[2.0, 9.0], [-1.0, 3.0]]))
        tensor([[2.0000, 0.0000],
                [0.0000, 1.5000]])
    """
    n = scores.shape[-1]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    if config.attention == "softmax":
        return scores.masked_fill(future, float("-inf")).softmax(-1)
    past = scores.masked_fill(future, 0.0)
    weights = past.relu() if config.attention == "relu" else past
    return weights / torch.arange(1, n + 1, dtype=scores.dtype)[:, None]
