"""birthlens: watch the birth of an induction head, and read transformers as associative memories.

Packages, from the ground up (a module imports from its own package and from those below it):

    config          what a run is: every setting
    tasks           corpus, batches of tokens with their roles, reference predictors
    model           weights, the forward pass, and HookedTransformer (model.lens alone imports TransformerLens)
    runs            the directory on disk
    training        the loop, its engines, and sweeps
    analysis        memories, interventions, behaviour, theory
    claims, bench   the paper's claims, checked; the speed of this machine
    viz             figures, report, notebook
    cli             the command line
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from birthlens._version import __version__ as __version__

_HOMES = {
    "BigramTask": "tasks.bigram",
    "BirthlensError": "errors",
    "Head": "model.sites",
    "Monitor": "analysis.behaviour.monitor",
    "RunConfig": "config.run",
    "TokenBatch": "tasks.batch",
    "Weights": "model.weights",
    "load_run": "runs.run",
    "preset": "config.presets",
    "resume": "training.recording",
    "show_attention": "viz.notebook",
    "train": "training.loop",
    "train_to_disk": "training.recording",
    "fork": "training.forking",
}

if TYPE_CHECKING:
    from birthlens.analysis.behaviour.monitor import Monitor as Monitor
    from birthlens.config.presets import preset as preset
    from birthlens.config.run import RunConfig as RunConfig
    from birthlens.errors import BirthlensError as BirthlensError
    from birthlens.model.sites import Head as Head
    from birthlens.model.weights import Weights as Weights
    from birthlens.runs.run import load_run as load_run
    from birthlens.tasks.batch import TokenBatch as TokenBatch
    from birthlens.tasks.bigram import BigramTask as BigramTask
    from birthlens.training.forking import fork as fork
    from birthlens.training.loop import train as train
    from birthlens.training.recording import resume as resume
    from birthlens.training.recording import train_to_disk as train_to_disk
    from birthlens.viz.notebook import show_attention as show_attention

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import birthlens` stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'birthlens' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}.")
    return getattr(import_module(f"birthlens.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
