"""Attention scores of relative positions, and the pattern that attention makes of its scores.

    score_ts = scale * (q_t . k_s + q_t . r_{t-s})      with a learned vector r for each lag (`W_R`) and head

as in Edelman et al. 2024 (arXiv 2402.11004); values have no relative term. The pattern is a softmax over the past, or
weights that need not sum to one:

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


def relative_scores(
    queries: Float[Tensor, "*batch pos d_head"], table: Float[Tensor, "*heads n_ctx d_head"]
) -> Float[Tensor, "*batch pos key_pos"]:
    """Return q_t . r_{t-s} for every query and key of a whole sequence, unscaled; later keys have that of lag 0.

    Example:
        >>> queries = torch.tensor([[1.0], [10.0]])
        >>> relative_scores(queries, torch.tensor([[2.0], [3.0], [4.0]]))
        tensor([[ 2.,  2.],
                [30., 20.]])
    """
    n = queries.shape[-2]
    places = torch.arange(n, device=queries.device)
    lags = (places[:, None] - places).clamp(min=0)
    by_lag = queries @ table[..., :n, :].transpose(-1, -2)
    return by_lag.gather(-1, lags.expand_as(by_lag))


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
    future = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
    if config.attention == "softmax":
        return scores.masked_fill(future, float("-inf")).softmax(-1)
    past = scores.masked_fill(future, 0.0)
    weights = past.relu() if config.attention == "relu" else past
    return weights / torch.arange(1, n + 1, dtype=scores.dtype, device=scores.device)[:, None]
