"""Tiny runs for the tests of claims: trained once a session, by the overrides that make them different."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from birthlens.config.run import RunConfig
from birthlens.runs.run import Run
from birthlens.training.sweep import prepare, run_path

torch.set_num_threads(1)  # models this small are not worth the waiting of threads for each other
HOME = Path(tempfile.mkdtemp(prefix="birthlens-claims-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
TINY = ("corpus.source=markov", "corpus.vocabulary=12", "task.context=32", "task.n_triggers=3", "model.d_model=16",
        "training.steps=40", "training.batch_size=16", "checkpoints.every=10", "evaluation.every=10",
        "evaluation.batch_size=16", "training.engine=handwritten")  # fmt: skip


@cache
def run(*overrides: Any) -> Any:
    """Train a run with overrides on the tiny base, or return the one that was."""
    free = {"model.family=full", "model.n_layers=1", "model.feed_forward=relu"} & set(overrides)
    free |= {word for word in overrides if word.startswith(("training.clamps=[pin", "training.clamps=[copy"))}
    without_triggers = {"task.kind=markov", "task.kind=facts"} & set(overrides)
    base = [word for word in TINY if not (without_triggers and word.startswith("task.n_triggers"))]
    config = RunConfig.parse({}, [*base, *(["training.engine=functional"] if free else []), *overrides])
    outcome = prepare(config, run_path(config, HOME))
    assert outcome.state != "failed", outcome.message
    return Run(outcome.path)
