"""birthlens: watch an induction head being born, and read transformers as associative memories.

The house, from the ground up (imports only go down):

    config, presets       what a run is          architecture, sites    what a model is made of, addresses in it
    corpus, task          text -> chain -> batches    weights, initialisation    the tensors of one checkpoint
    forward, model        the fast forward pass, and HookedTransformer (the only door to TransformerLens)
    oracles               reference predictors and loss floors          runs       the directory on disk
    analysis/             memories, ledger, behaviour, attention, ablation, patching, paths, scores, theory
    training/             the loop and its engines: reference, functional, handwritten, fused
    figures, notebook, report, cli                pictures, pages and the command line
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BigramTask": "task",
    "BirthlensError": "errors",
    "Head": "sites",
    "RunConfig": "config",
    "TokenBatch": "task",
    "Weights": "weights",
    "load_run": "runs",
    "preset": "presets",
    "resume": "training.recording",
    "show_attention": "notebook",
    "train": "training.loop",
    "train_to_disk": "training.recording",
}

if TYPE_CHECKING:
    from birthlens.config import RunConfig as RunConfig
    from birthlens.errors import BirthlensError as BirthlensError
    from birthlens.notebook import show_attention as show_attention
    from birthlens.presets import preset as preset
    from birthlens.runs import load_run as load_run
    from birthlens.sites import Head as Head
    from birthlens.task import BigramTask as BigramTask
    from birthlens.task import TokenBatch as TokenBatch
    from birthlens.training.loop import train as train
    from birthlens.training.recording import resume as resume
    from birthlens.training.recording import train_to_disk as train_to_disk
    from birthlens.weights import Weights as Weights

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used, so that `import birthlens` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'birthlens' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}.")
    return getattr(import_module(f"birthlens.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
