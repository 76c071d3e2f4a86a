"""Results of causal suites on disk: a manifest that describes what was run, and one durable file for each checkpoint.

    manifest.json       the request (interventions in full), the subject, a hash of the data, the device, versions, seeds
    steps/<step>.json   {"model": hash of the weights, "rows": [...]}

A checkpoint's rows are valid only for the weights they were measured on: a file with another hash is out of date.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from birthlens.analysis.interventions.spec import AnyIntervention
from birthlens.analysis.interventions.truncation import MatrixIntervention
from birthlens.errors import BirthlensError
from birthlens.model.weights import Weights
from birthlens.runs.files import versions
from birthlens.system import write_atomically
from birthlens.tasks.batch import TokenBatch

if TYPE_CHECKING:
    import pandas as pd

    from birthlens.model.hooked import HookedModel

NUMBERS_DEPEND_ON = ("python", "birthlens", "torch", "transformer-lens", "numpy")
"""The versions that must agree before a suite is continued; the others in a manifest are for information."""


def manifest(
    asked: Mapping[str, Any], subject: Mapping[str, Any], batches: Mapping[str, TokenBatch | None]
) -> dict[str, Any]:
    """Describe a piece of work: the request, its subject (in the caller's words), the data, the device, the versions."""
    return {
        **asked,
        "subject": dict(subject),
        **{name: None if batch is None else _described(batch) for name, batch in batches.items()},
        "device": next(batch.device.type for batch in batches.values() if batch is not None),
        "versions": versions(),
    }


def spelled_out(cases: Mapping[str, Iterable[AnyIntervention | MatrixIntervention]]) -> dict[str, list[dict[str, Any]]]:
    """Return every case as plain data that a suite can read."""
    return {name: [one.to_json() for one in case] for name, case in cases.items()}


def write_manifest(path: Path, described: Mapping[str, Any]) -> None:
    """Write a manifest."""
    write_atomically(path, json.dumps(described, indent=2, sort_keys=True).encode())


def open_results(directory: Path, described: Mapping[str, Any]) -> None:
    """Create a directory for the results that a manifest describes, or check that it already holds them.

    Raises:
        BirthlensError: if it holds other results, results made with other versions, or cannot be created.
    """
    path = directory / "manifest.json"
    try:
        (directory / "steps").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BirthlensError(f"{directory} cannot be created as a directory for results: {error.strerror}.") from None
    if not path.exists():
        write_manifest(path, described)
        return
    before = _read(path)
    now = json.loads(json.dumps(described))
    if not isinstance(before, dict):
        raise _damaged(path)
    before = {"device": "cpu", **before}  # manifests from before there were devices
    different = [key for key in now if key != "versions" and now[key] != before.get(key)]
    if not different and (changed := _changed_versions(before.get("versions"), now["versions"])):
        raise BirthlensError(
            f"{directory} holds results made with other versions ({', '.join(changed)}); choose another directory, "
            "or delete this one."
        )
    if different:
        raise BirthlensError(
            f"{directory} holds results of another suite: its {', '.join(different)} differ; choose another directory."
        )


def _changed_versions(before: object, now: Mapping[str, str]) -> list[str]:
    """List the versions that affect numbers and have changed."""
    known = before if isinstance(before, Mapping) else {}
    then = {name: known.get(name) or "absent" for name in NUMBERS_DEPEND_ON}
    return [f"{name} was {then[name]}, is {now[name]}" for name in then if then[name] != now[name]]


def read_rows(directory: Path, step: int, model: str | None = None) -> list[dict[str, Any]]:
    """Return a checkpoint's rows; empty if there is no file, or if it is out of date for the given hash of the model."""
    path = _step_file(directory, step)
    if not path.exists():
        return []
    found = _read(path)
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "case" in row for row in rows):
        raise _damaged(path)
    return rows if model in (None, found.get("model")) else []


def write_rows(directory: Path, step: int, rows: Sequence[Mapping[str, Any]], model: str) -> None:
    """Write a checkpoint's rows with the hash of its weights."""
    write_atomically(_step_file(directory, step), json.dumps({"model": model, "rows": rows}).encode())


def read_results(directory: Path, steps: Sequence[int] | None = None) -> pd.DataFrame:
    """Read a suite's table, with all steps in the directory or the given ones, in order.

    Raises:
        BirthlensError: if the directory holds no results, or a file in it is damaged.
    """
    import pandas as pd

    there = {int(path.stem) for path in (directory / "steps").glob("*.json") if path.stem.isdecimal()}
    chosen = sorted(there) if steps is None else [step for step in steps if step in there]
    if not chosen:
        raise BirthlensError(f"{directory} holds no results of a suite.")
    tables = []
    for step in chosen:
        table = pd.DataFrame(read_rows(directory, step))
        table.insert(0, "step", step)
        tables.append(table)
    whole = pd.concat(tables, ignore_index=True)
    for name in ("value", "change", "low", "high", "change_low", "change_high"):
        if name in whole:
            whole[name] = pd.to_numeric(whole[name])
    return whole


def model_hash(model: Weights | HookedModel) -> str:
    """Return a hash of a model's weights and sizes."""
    content = hashlib.sha256()
    if isinstance(model, Weights):
        content.update(json.dumps(model.config.to_data(), sort_keys=True).encode())
        for name in sorted(model):
            content.update(name.encode() + np.ascontiguousarray(model[name]).tobytes())
        return content.hexdigest()
    content.update(f"{model.cfg.n_layers} layers, {model.cfg.n_heads} heads".encode())
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().contiguous().flatten().view(torch.uint8)
        content.update(name.encode() + plain.cpu().numpy().tobytes())
    return content.hexdigest()


def _step_file(directory: Path, step: int) -> Path:
    return directory / "steps" / f"{step}.json"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _damaged(path) from None


def _damaged(path: Path) -> BirthlensError:
    return BirthlensError(
        f"{path} is damaged, or not a file of birthlens; delete it, and its results will be computed again."
    )


def _described(batch: TokenBatch) -> dict[str, Any]:
    content = hashlib.sha256()
    tensors = {each.name: getattr(batch, each.name) for each in fields(batch) if each.name != "marks"}
    for name, tensor in (tensors | dict(batch.marks)).items():
        content.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return {"sequences": len(batch), "positions": int(batch.tokens.shape[1]), "sha256": content.hexdigest()}
