"""A stored run judged by effect: its first steps, trained again by the current code, must give the same numbers.

The replay starts at step 0 and ends at the first kept step after it. The constants, the weights at both steps, and every
measurement up to the second one are compared bit for bit. It shows that initialisation, batches, gradients, optimiser and
evaluation are the same; it does not cover what the config does only later (a `freeze_until` beyond that step).
"""

from __future__ import annotations

import torch

from birthlens.errors import BirthlensError
from birthlens.runs.run import Run
from birthlens.training.loop import Trainer, train
from birthlens.training.recording import config_begun_with, execution_of

LONGEST = 300
"""The most steps in a replay; if the first kept step comes later, the run is not compared."""


def replayed(run: Run, longest: int = LONGEST) -> int | None:
    """Return the step up to which a replay is equal bit for bit, or None if it differs or would take too long.

    It first trains on the threads of this process. If that gives other bits, it trains on as many threads as the run, since
    they change the last bits of some engines.
    """
    last = next((step for step in run.steps if step > 0), None)
    if last is None or last > longest or run.steps[0] != 0:
        return None
    before = torch.get_num_threads()
    try:
        for threads in dict.fromkeys((before, run.header["engine"]["threads"])):
            torch.set_num_threads(threads)
            if _equal(run, last):
                return last
    except BirthlensError:
        return None  # its engine is unavailable here, or it diverges now
    finally:
        torch.set_num_threads(before)
    return None


def _equal(run: Run, last: int) -> bool:
    config = config_begun_with(run)
    trainer = Trainer(config, run.statistics, execution=execution_of(run))
    rows = []
    for record in train(config, trainer=trainer):
        rows += record.metrics
        if record.step in (0, last):
            now = record.weights
            then = run.weights(record.step)
            if any(now[name].tobytes() != then[name].tobytes() for name in now):
                return False
        if record.step == last:
            break
    columns = ("step", "split", "metric", "value", "n")
    stored = [row for row in run.rows() if row["step"] <= last]
    return [[row[key] for key in columns] for row in rows] == [[row[key] for key in columns] for row in stored]
