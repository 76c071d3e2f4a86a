"""From a config to its task: the tasks that come with birthlens, and a user's own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from birthlens.config.run import RunConfig
from birthlens.config.task import own_task
from birthlens.errors import BirthlensError
from birthlens.tasks.corpus import BigramStatistics, statistics_of, text_of

if TYPE_CHECKING:
    from birthlens.config.task import TaskSection
    from birthlens.tasks.task import Task

HOMES = {
    "bigram": "birthlens.tasks.bigram:BigramTask",
    "noise": "birthlens.tasks.noise:NoiseTask",
    "backcopy": "birthlens.tasks.backcopy:BackcopyTask",
    "markov": "birthlens.tasks.markov:MarkovTask",
    "facts": "birthlens.tasks.facts:FactsTask",
    "text": "birthlens.tasks.text:TextTask",
}
"""The module and class of every task that comes with birthlens."""


def task_class(kind: str) -> type[Task]:
    """Return the class of a kind of task."""
    from birthlens.tasks.task import Task

    if kind in HOMES:
        module, _, name = HOMES[kind].partition(":")
        return getattr(import_module(module), name)
    found = own_task(kind)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise BirthlensError(f"task.kind = {kind!r}: {found!r} must be a subclass of birthlens.tasks.task.Task.")
    return found


def chain_of(config: RunConfig) -> BigramStatistics:
    """Return the global chain of a run's task: the corpus's, with the task's special tokens."""
    found = task_class(config.task.kind)
    if found.needs_text:
        chain: object = found.chain_of_text(config.task, text_of(config.corpus))
    else:
        chain = found.chain(config.task, statistics_of(config.corpus) if found.needs_corpus else None)
    if not isinstance(chain, BigramStatistics):
        method = "chain_of_text" if found.needs_text else "chain"
        raise BirthlensError(
            f"{found.__name__}.{method} returned a {type(chain).__name__}; it must return BigramStatistics."
        )
    return chain


def task_of(config: TaskSection, chain: BigramStatistics) -> Task:
    """Return the task of a config section over the chain of `chain_of`.

    Example:
        >>> config = RunConfig.parse({}, ["task.kind=noise", "task.context=8"])
        >>> task_of(config.task, chain_of(config)).batch(2, seed=0).tokens.shape
        torch.Size([2, 8])
    """
    return task_class(config.kind)(config, chain)
