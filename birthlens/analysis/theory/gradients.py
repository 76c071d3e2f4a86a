"""Population gradients in closed form: gradients are associative memories (paper section 7).

Vectors are rows, logits = x W W_U, and the loss is cross-entropy. p_hat is the model's prediction, and u_k is the k-th
column of W_U.

1. Clean inputs, x = w_E(z):   grad W = sum_z sum_k ( p(z) p_hat(k|z) - p(z, k) ) w_E(z)^T u_k               (exact)
2. Noisy inputs:               grad W = sum_k p(k) ( mu_hat_k - mu_k )^T u_k,  mu_k = E[x | y = k],
                               mu_hat_k = E[ p_hat(k|x) x ] / p(k)                                            (Monte Carlo)
3. Attention, P the pattern, S its scores, v_s the values after W_O, g_t = d loss / d residual at t:

       d loss / d S_ts = P_ts g_t . ( v_s - sum_r P_tr v_r )      at W_K = 0, where P_ts = 1/t:  (1/t) g_t . (v_s - mean v)
       grad W_K        = scale sum_t sum_{s<=t} (d loss / d S_ts) x_s^T x_t W_Q                               (Monte Carlo)

`simplified_gradients` chains 2 and 3 through both layers for any weights. Error bars are standard errors over batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

from birthlens.errors import BirthlensError
from birthlens.model.forward import tensors_of
from birthlens.model.weights import Weights
from birthlens.shapes import Bool, Float, Int
from birthlens.tasks.bigram import BigramTask
from birthlens.tasks.roles import role_masks

Array = np.ndarray
Loss = Literal["in_context", "all"]
"""The positions that a gradient is taken over, as in `training.loss`."""
MATRICES = ("L1.W_O", "L1.W_K", "L0.W_K")
"""The three memories in the order in which the theorem moves them: output, trigger, previous token."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over batches and its standard error, entry by entry."""

    mean: Float[Array, "*shape"]
    error: Float[Array, "*shape"]
    n: int


def estimate(draws: Iterable[Float[Array, "*shape"]]) -> Estimate:
    """Average independent draws in one pass, in float64.

    Example:
        >>> found = estimate([np.array([0.0]), np.array([2.0])])
        >>> found.mean.tolist(), found.error.tolist(), found.n
        ([1.0], [1.0], 2)
    """
    n = 0
    mean = np.zeros(())
    squares = np.zeros(())
    for draw in draws:
        n += 1
        step = draw - mean
        mean = mean + step / n
        squares = squares + step * (draw - mean)
    if n < 2:
        raise BirthlensError(f"draws = {n}: an estimate with an error bar needs at least 2 batches.")
    return Estimate(mean, np.sqrt(squares / (n - 1) / n), n)


def clean_gradient(
    joint: Float[Array, "input output"],
    inputs: Float[Array, "input d_in"],
    outputs: Float[Array, "output d_out"],
    matrix: Float[Array, "d_in d_out"],
) -> Float[Array, "d_in d_out"]:
    """Return the exact gradient of E[-log softmax(x W U^T)_y], where x is one of `inputs` and (z, y) ~ `joint`.

    Example:
        >>> joint = np.diag([0.5, 0.5])
        >>> (-clean_gradient(joint, np.eye(2), np.eye(2), np.zeros((2, 2)))).tolist()
        [[0.25, -0.25], [-0.25, 0.25]]
    """
    predicted = softmax(inputs @ matrix @ outputs.T, axis=-1)
    return np.asarray(inputs.T @ (joint.sum(1, keepdims=True) * predicted - joint) @ outputs)


def noisy_gradient(
    inputs: Float[Array, "n d_in"],
    targets: Int[Array, "n"],
    outputs: Float[Array, "output d_out"],
    matrix: Float[Array, "d_in d_out"],
) -> Float[Array, "d_in d_out"]:
    """Return sum_k p(k) (mu_hat_k - mu_k)^T u_k, with all averages over the given draws (formula 2)."""
    n = len(inputs)
    predicted = softmax(inputs @ matrix @ outputs.T, axis=-1)
    observed = np.eye(len(outputs))[targets]
    # These are p(k) mu_hat_k and p(k) mu_k.
    model_means = predicted.T @ inputs / n
    data_means = observed.T @ inputs / n
    return np.asarray((model_means - data_means).T @ outputs)


@dataclass(frozen=True)
class Readout:
    """How the theorem's assumptions change the logits.

    `direct_path=False` reads out only what layer 1 writes, without the residual stream below it. `bias` is added to the
    logits (log p(y) makes the first prediction p(y) rather than uniform). `centred=True` subtracts the batch mean from the
    vectors that a gradient pairs with errors: the inputs of W_O, and the queries of layer 1's W_K. Token frequencies then do
    not enter a memory. Layer 0 is not centred, because its positions are equally frequent.
    """

    direct_path: bool = True
    bias: Tensor | None = None
    centred: bool = False

    def centre(
        self, x: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Subtract the mean over `mask` if `centred`."""
        return x - x[mask].mean(0) if self.centred else x


@dataclass(frozen=True, eq=False)
class Pass:
    """Everything from one forward pass through the simplified model that its gradients need."""

    x0: Float[Tensor, "batch pos d_model"]
    p0: Float[Tensor, "batch query_pos key_pos"]
    x1: Float[Tensor, "batch pos d_model"]
    p1: Float[Tensor, "batch query_pos key_pos"]
    z1: Float[Tensor, "batch pos d_head"]
    logits: Float[Tensor, "batch pos d_vocab"]


def simplified_pass(
    tensors: Mapping[str, Tensor], scale: float, tokens: Int[Tensor, "batch pos"], readout: Readout = Readout()
) -> Pass:
    """Run the two-layer simplified model without feed-forward; if W_K is all zero, no scores are computed."""
    x0 = tensors["W_E"][tokens] + tensors["W_pos"][: tokens.shape[1]]
    p0 = _pattern(tensors, 0, scale, x0)
    x1 = x0 + p0 @ (x0 @ (tensors["L0.W_V"][0] @ tensors["L0.W_O"][0]))
    p1 = _pattern(tensors, 1, scale, x1)
    z1 = p1 @ (x1 @ tensors["L1.W_V"][0])
    out = z1 @ tensors["L1.W_O"][0]
    logits = (x1 + out if readout.direct_path else out) @ tensors["W_U"]
    return Pass(x0, p0, x1, p1, z1, logits if readout.bias is None else logits + readout.bias)


def simplified_gradients(
    tensors: Mapping[str, Tensor],
    scale: float,
    tokens: Int[Tensor, "batch pos"],
    targets: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    names: Iterable[str] = MATRICES,
    readout: Readout = Readout(),
) -> dict[str, Float[Tensor, "head d_in d_out"]]:
    """Return the gradient of the mean loss over `mask` with respect to each named matrix, by the formulas above.

    Raises:
        BirthlensError: for a name that is not in `MATRICES`, or a mask without positions.
    """
    wanted = tuple(names)
    if unknown := [name for name in wanted if name not in MATRICES]:
        raise BirthlensError(f"names = {unknown}: closed-form gradients exist for {', '.join(MATRICES)}.")
    total = int(mask.sum())
    if total == 0:
        raise BirthlensError("mask marks no position; draw more or longer sequences.")
    run = simplified_pass(tensors, scale, tokens, readout)
    g_logits = run.logits.softmax(-1)
    g_logits.scatter_add_(-1, targets[..., None], torch.full_like(g_logits[..., :1], -1.0))
    g_logits *= mask[..., None].to(g_logits.dtype) / total
    g = g_logits @ tensors["W_U"].T
    out: dict[str, Tensor] = {}
    if "L1.W_O" in wanted:
        out["L1.W_O"] = torch.einsum("btd,bte->de", readout.centre(run.z1, mask), g)[None]
    if "L1.W_K" not in wanted and "L0.W_K" not in wanted:
        return out
    value_map = tensors["L1.W_V"][0]
    to_values = g @ tensors["L1.W_O"][0].T
    g_scores = scale * _through_softmax(run.p1, to_values @ (run.x1 @ value_map).transpose(1, 2))
    query_map = tensors["L1.W_Q"][0]
    key_map = tensors["L1.W_K"][0]
    if "L1.W_K" in wanted:
        queries = g_scores.transpose(1, 2) @ readout.centre(run.x1 @ query_map, mask)
        out["L1.W_K"] = torch.einsum("bsd,bse->de", run.x1, queries)[None]
    if "L0.W_K" not in wanted:
        return out
    g_x1 = run.p1.transpose(1, 2) @ to_values @ value_map.T  # as a value, as a key, as a query
    g_x1 += g_scores.transpose(1, 2) @ (run.x1 @ query_map) @ key_map.T
    g_x1 += g_scores @ (run.x1 @ key_map) @ query_map.T
    if readout.direct_path:
        g_x1 += g
    moved = run.x0 @ (tensors["L0.W_V"][0] @ tensors["L0.W_O"][0])
    g_scores = scale * _through_softmax(run.p0, g_x1 @ moved.transpose(1, 2))
    queries = g_scores.transpose(1, 2) @ (run.x0 @ tensors["L0.W_Q"][0])
    out["L0.W_K"] = torch.einsum("bsd,bse->de", run.x0, queries)[None]
    return {name: out[name] for name in wanted}


def population_gradients(
    weights: Weights,
    task: BigramTask,
    batches: int = 8,
    sequences: int = 64,
    seed: int = 0,
    loss: Loss = "in_context",
) -> dict[str, Estimate]:
    """Estimate the population gradient of a loss with respect to each of `MATRICES`, with error bars over batches."""
    check_simplified(weights)
    tensors = tensors_of(weights)
    draws = []
    for index in range(batches):
        batch = task.batch(sequences, seed, index)
        found = simplified_gradients(tensors, weights.score_scale, batch.tokens, batch.targets, role_masks(batch)[loss])
        draws.append({name: gradient.numpy() for name, gradient in found.items()})
    return {name: estimate(draw[name] for draw in draws) for name in MATRICES}


def check_simplified(weights: Weights) -> None:
    """Raise BirthlensError unless the weights are those of a two-layer simplified model that the formulas cover."""
    config = weights.config
    if (config.family, config.n_layers, config.feed_forward) != ("simplified", 2, "none") or "W_pos" not in weights:
        raise BirthlensError(
            f"model.family = {config.family!r}, n_layers = {config.n_layers}, feed_forward = {config.feed_forward!r}, "
            f"positions = {config.positions!r}: the closed-form gradients cover the simplified model of two layers "
            "with absolute positions and no feed-forward."
        )


def _pattern(
    tensors: Mapping[str, Tensor], layer: int, scale: float, x: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch query_pos key_pos"]:
    n = x.shape[1]
    key_map = tensors[f"L{layer}.W_K"][0]
    if not key_map.any():
        uniform = torch.ones(n, n, dtype=x.dtype).tril() / torch.arange(1, n + 1, dtype=x.dtype)[:, None]
        return uniform.expand(len(x), n, n)
    scores = scale * (x @ tensors[f"L{layer}.W_Q"][0]) @ (x @ key_map).transpose(1, 2)
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)


def _through_softmax(
    pattern: Float[Tensor, "batch query_pos key_pos"], g_pattern: Float[Tensor, "batch query_pos key_pos"]
) -> Float[Tensor, "batch query_pos key_pos"]:
    """Return P_ts (g_ts - sum_r P_tr g_tr): formula 3, with g_ts = g_t . v_s."""
    weighted = pattern * g_pattern
    return weighted - pattern * weighted.sum(-1, keepdim=True)
