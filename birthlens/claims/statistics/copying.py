"""Statistics of copying: how far the previous-token head reaches, and which copies the induction head uses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from birthlens.claims.claim import Evidence
from birthlens.model import forward
from birthlens.runs.run import Run
from birthlens.shapes import Bool, Float
from birthlens.tasks.batch import TokenBatch

Array = np.ndarray


def early_copies(evidence: Evidence) -> dict[str, float]:
    """Measure how far the previous-token head reaches, and where the induction head finds its copies, at the end.

    `attention_early`, `attention_late`: attention of layer 0 from t to t - 1, in the first and last quarter of positions.
    For in-context targets in the last half of the context:
    `used_early`: share of correct predictions whose most attended position is in the first quarter;
    `used_early_by_chance`: the same if one of the right copies (positions after an earlier occurrence of the same token) is
    chosen at random; `early_excess`: the difference;
    `accuracy_with`, `accuracy_without`: accuracy if the trigger has or has not been seen with its output in the first
    quarter.
    """
    run = evidence.runs["run"]
    batch = run.task.batch(evidence.settings.get("sequences", 64), run.config.seeds.evaluation + evidence.seed, 1)
    tensors = forward.tensors_of(run.weights(-1))
    quarter = run.config.task.context // 4
    used = []
    chance = []
    right = []
    back = []
    with torch.inference_mode():
        for part in batch.chunks(16):
            seen = forward.activations(tensors, run.config.model, part.tokens)
            used.append(seen.patterns[1][:, 0].argmax(-1) < quarter)
            chance.append(_early_share(part, quarter))
            right.append(seen.logits.argmax(-1) == part.targets)
            back.append(_to_previous(seen))
    early = torch.cat(used).double()
    by_chance = torch.cat(chance)
    correct = torch.cat(right)
    profile = _profile(back)
    asked = batch.in_context & ~batch.absorbed
    late = asked & (torch.arange(asked.shape[1]) >= 2 * quarter)
    early_copy = seen_before(batch, quarter)
    found = {
        "attention_early": float(profile[1:quarter].mean()),
        "attention_late": float(profile[-quarter:].mean()),
        "used_early": _mean(early, late & correct),
        "used_early_by_chance": _mean(by_chance, late & correct),
        "accuracy": _mean(correct.double(), asked),
        "accuracy_with": _mean(correct.double(), late & early_copy),
        "accuracy_without": _mean(correct.double(), late & ~early_copy),
        "share_with": _mean(early_copy.double(), late),
    }
    found["attention_drop"] = found["attention_early"] - found["attention_late"]
    found["early_excess"] = found["used_early"] - found["used_early_by_chance"]
    found["accuracy_gain"] = found["accuracy_with"] - found["accuracy_without"]
    return found


def attention_to_previous(run: Run, batch: TokenBatch) -> Float[Array, "pos"]:
    """Return the mean attention of head 0 of layer 0 from each position t to t - 1, at the end; NaN at t = 0."""
    tensors = forward.tensors_of(run.weights(-1))
    with torch.inference_mode():
        parts = batch.chunks(16)
        return _profile([_to_previous(forward.activations(tensors, run.config.model, part.tokens)) for part in parts])


def seen_before(batch: TokenBatch, end: int) -> Bool[torch.Tensor, "batch pos"]:
    """Return, for each position, whether its token occurs with the same successor in the first `end` positions."""
    early = batch.tokens[:, : end - 1]
    return (early[:, None] == batch.tokens[:, :, None]).any(-1)


def _to_previous(seen: forward.Activations) -> Float[torch.Tensor, "batch pos"]:
    return seen.patterns[0][:, 0].diagonal(-1, dim1=1, dim2=2).double()


def _profile(back: Sequence[Float[torch.Tensor, "_ pos"]]) -> Float[Array, "pos_plus_one"]:
    return np.concatenate([[np.nan], torch.cat(list(back)).mean(0).numpy()])


def _early_share(batch: TokenBatch, end: int) -> Float[torch.Tensor, "batch pos"]:
    """Return the share of the copies visible to a position that are in the first `end` positions; NaN if there are none.

    A copy for t is a position s <= t such that the token before it is the token at t.
    """
    tokens = batch.tokens
    copies = tokens[:, :, None] == tokens[:, None, :-1]  # [.., t, s - 1]
    visible = torch.arange(tokens.shape[1])[:, None] >= torch.arange(1, tokens.shape[1])
    copies = (copies & visible).double()
    return copies[..., : end - 1].sum(-1) / copies.sum(-1)


def _mean(values: Float[torch.Tensor, "batch pos"], among: Bool[torch.Tensor, "batch pos"]) -> float:
    return float(values[among].mean()) if bool(among.any()) else float("nan")
