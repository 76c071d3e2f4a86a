"""Statistics of the further papers against live HookedTransformers, and on what a run measured itself."""

import numpy as np
import pytest
import torch
from claim_runs import run

from birthlens.claims.claim import Evidence
from birthlens.claims.statistics import facts, markov, sinks
from birthlens.model.hooked import build
from birthlens.runs.evaluation import evaluation_batch
from birthlens.tasks.predictors.reference import predict

FULL = ("model.family=full", "model.n_layers=1", "optimiser.kind=adamw", "optimiser.learning_rate=0.01")
FACTS = ("task.kind=facts", "task.context=8", "task.subjects=4", "task.relations=2", "task.answers=2", "training.loss=fact",
         "model.n_heads=2", "model.feed_forward=relu", "model.block=sequential", *FULL)  # fmt: skip


def test_a_cut_key_is_one_whose_score_is_minus_infinity() -> None:
    trained = run(*FACTS, "training.steps=60", "checkpoints.every=60")
    task = trained.task
    batch = evaluation_batch(trained, 32)
    weights = trained.weights(-1)
    found = facts.cut(Evidence({"run": trained}, 0, {"sequences": 32}))
    names = {"subject": batch.tokens < 4, "relation": (batch.tokens >= 4) & (batch.tokens < 6)}
    for name, keys in names.items():
        hook = lambda scores, hook, keys=keys: scores.masked_fill(keys[:, None, None], -torch.inf)  # noqa: E731
        logits = build(weights).run_with_hooks(batch.tokens, fwd_hooks=[("blocks.0.attn.hook_attn_scores", hook)])
        right = logits[:, -1].argmax(-1) == batch.targets[:, -1]
        assert found[f"fact_without_{name}"] == pytest.approx(float(right.float().mean()))
    assert facts.accuracies(weights, task, batch)[1] > max(found[f"fact_without_{name}"] for name in names)


def test_the_excess_is_the_loss_less_that_of_the_counting_posterior() -> None:
    trained = run("task.kind=markov", "task.states=2", "task.context=12", "training.loss=all", *FULL)
    batch = evaluation_batch(trained, 16)
    logits = build(trained.weights(-1))(batch.tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()
    law = predict("bigram", trained.task, batch)
    floor = -np.log(np.take_along_axis(law, batch.targets.numpy()[..., None], -1)).mean()
    assert markov.excess_over_bigrams(trained.weights(-1), trained.task, batch) == pytest.approx(loss - floor, abs=1e-5)


def test_rectified_attention_is_measured_beside_the_softmax() -> None:
    words = ("task.kind=backcopy", "task.context=16", "training.loss=all", *FULL)
    cases = {"softmax": run(*words), "relu": run(*words, "model.attention=relu")}
    found = sinks.rectified(Evidence(cases, 0, {"sequences": 8}))
    ends = {
        case: each.metrics().query("split == 'held_out' and metric == 'in_context_loss'")["value"].iloc[-1]
        for case, each in cases.items()
    }
    assert found["in_context_loss_more"] == pytest.approx(ends["relu"] - ends["softmax"]) != 0
    batch = evaluation_batch(cases["relu"], 8)
    _, cache = build(cases["relu"].weights(-1)).run_with_cache(batch.tokens)
    others = ~batch.in_context
    others[:, 0] = False
    assert found["sink"] == pytest.approx(cache["pattern", 0][:, 0, :, 0][others].mean().item(), rel=1e-4)
