"""Small runs for the tests of what is seen: made once a session, in a temporary directory."""

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from resealing import reseal

from birthlens.config.run import RunConfig
from birthlens.runs.run import load_run
from birthlens.training.recording import train_to_disk

HOME = Path(tempfile.mkdtemp(prefix="birthlens-seeing-"))
TINY = ["task.context=24", "task.n_triggers=3", "model.d_model=32", "optimiser.kind=adamw", "optimiser.learning_rate=0.01",
        "training.steps=12", "training.batch_size=16", "checkpoints.every=3", "evaluation.batch_size=8",
        "evaluation.every=3"]  # fmt: skip
KINDS = {
    "paper": [],
    "other": ["model.d_model=16", "seeds.init=1"],
    "random": ["task.triggers=random"],
    "one_layer": ["model.n_layers=1"],
    "full": [
        "model.family=full",
        "model.n_heads=2",
        "model.d_model=16",
        "model.feed_forward=relu",
        "training.loss=all",
    ],
    "rotary": ["model.positions=rotary"],
    "no_triggers": ["task.n_triggers=0", "training.loss=all"],
}


@cache
def run(kind: Any = "paper") -> Any:
    """Train a run of a kind, or return the one that was."""
    path = HOME / kind
    shutil.rmtree(path, ignore_errors=True)
    for _ in train_to_disk(RunConfig.parse({}, [*TINY, *KINDS[kind]]), path):
        pass
    return load_run(path)


@cache
def unfinished() -> Any:
    """Return a copy of the paper run that stopped half-way."""
    path = HOME / "unfinished"
    shutil.copytree(run().path, path)
    for step in (9, 12):
        (path / "checkpoints" / f"step_{step:08d}.safetensors").unlink()
    lines = [line for line in (path / "metrics.jsonl").read_text().splitlines() if '"step": 9,' not in line]
    (path / "metrics.jsonl").write_text(
        "".join(line + "\n" for line in lines if '"step": 1' not in line or '"step": 1,' in line)
    )
    (path / "resume.safetensors").unlink()
    reseal(path)
    return load_run(path)
