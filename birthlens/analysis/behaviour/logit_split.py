"""Direct logit attribution: the logit of an answer as a sum over what every component writes.

The residual stream that the unembedding reads is a sum of what the senders write, and with the divisor of the final norm
held at its value, a logit (or the difference of two) is linear in it:

    logit(answer) = sum over senders S of  g . S  +  biases,        g = d logit / d residual stream

The split is exact. Models whose logits are not linear in the stream, or whose stream is not this sum, are refused.
`decomposition` does the same in float64 for weights, and follows paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from birthlens.analysis.interventions.ablation import Models
from birthlens.analysis.interventions.attribution import metric_gradients
from birthlens.analysis.interventions.backends import HookedBackend, backend_of
from birthlens.analysis.interventions.edges import written
from birthlens.analysis.interventions.metrics import Metric
from birthlens.analysis.interventions.scoring import Scoring
from birthlens.analysis.interventions.spec import EdgeIntervention
from birthlens.errors import BirthlensError
from birthlens.model.components import edges_of, has_norms
from birthlens.model.effects import architecture, check_edges, check_effect
from birthlens.model.hooks import captured, edited
from birthlens.model.sites import FINAL_NORM, Edge, Logits, Point
from birthlens.tasks.positions import check_tokens
from birthlens.tasks.prompts import PromptBatch

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.model.hooked import HookedModel
    from birthlens.model.weights import Weights

_TOLERANCE = 1e-3
"""How far logits may be from linear, as a share of the largest contribution."""
BIASES = "biases"


def logit_split_of_prompts(models: Models, prompts: PromptBatch) -> pd.DataFrame:
    """Split the answer's logit at the last token of each prompt, or the logit difference if there are wrong answers.

    Columns: step, prompt (from 1), metric (logit or logit_difference), component (embed, pos_embed, L0H0, L0.mlp, ..., and
    biases, which are the rest), value. The values of a prompt add up to the metric.

    Raises:
        BirthlensError: for a model that cannot be split in this way, and tokens that do not fit the model.
    """
    import pandas as pd

    quantity = "logit" if prompts.wrong is None else "logit_difference"
    roles = {"answer": prompts.clean.marks["answer"]}
    scoring = Scoring((Metric("answer", quantity),), roles, prompts.clean.targets, prompts.wrong)
    rows: list[tuple[Any, ...]] = []
    for step, model in models:
        for component, values in _split(_live(model), prompts, scoring).items():
            rows += [(step, n, quantity, component, float(value)) for n, value in enumerate(values, start=1)]
    table = pd.DataFrame(rows, columns=["step", "prompt", "metric", "component", "value"])
    return table.sort_values(["step", "prompt"], kind="stable", ignore_index=True)


def _live(model: Weights | HookedModel) -> HookedModel:
    backend = backend_of(model, {"edges": (EdgeIntervention(Edge.parse("embed->logits"), "zero"),)})
    assert isinstance(backend, HookedBackend)
    return backend.model


def _split(model: HookedModel, prompts: PromptBatch, scoring: Scoring) -> dict[str, Tensor]:
    """Return the contribution of each sender to each prompt's metric."""
    batch = prompts.clean
    check_tokens(batch, int(model.cfg.d_vocab), int(model.cfg.n_ctx), "the file of prompts")
    check_edges(model)
    stream = Point("resid_post", model.cfg.n_layers - 1)
    norm = [Point(FINAL_NORM)] if has_norms(model.cfg) else []
    for point in norm:
        check_effect(model, point)
    senders = {edge.sender: EdgeIntervention(edge, "zero").point for edge in edges_of(model.cfg, [Logits()])}
    known = captured(model, batch.tokens, {*senders.values(), stream, *norm})
    held = {point: known[point] for point in norm}
    direction = metric_gradients(model, batch, scoring, held, {stream})[stream][0].double()

    def contribution(written: Tensor) -> Tensor:
        return (written.double() * direction).sum((1, 2))

    with torch.no_grad():
        found = {str(sender): contribution(written(model, sender, known[point])) for sender, point in senders.items()}
        whole = scoring.sums(model(batch.tokens))[:, 0]
        doubled = {stream: [lambda value, rows: 2 * value]} | {point: [_held(known[point])] for point in norm}
        with edited(model, doubled):
            twice = scoring.sums(model(batch.tokens))[:, 0]
    largest = max(float(value.abs().max()) for value in (*found.values(), whole))
    if not torch.allclose(twice - whole, contribution(known[stream]), atol=_TOLERANCE * largest, rtol=0):
        raise BirthlensError(
            f"logits of this model ({architecture(model)}) are not linear in the residual stream, so they cannot be split."
        )
    return {**found, BIASES: whole - torch.stack(list(found.values())).sum(0)}


def _held(fixed: Tensor) -> Any:
    return lambda value, rows: fixed.expand_as(value)
