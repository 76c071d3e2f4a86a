"""Files of a run changed on purpose, with digests that match again: what remains to be found is in the content."""

import json
from typing import Any

from birthlens.model.weights import load_with_metadata, save_tensors
from birthlens.runs.files import (
    CONSTANTS,
    COST,
    HEADER,
    METRICS,
    RESUME,
    TABLES,
    checkpoint_file,
    checkpoint_name,
    listed_steps,
)
from birthlens.runs.header import write_header
from birthlens.runs.metrics import lines_of
from birthlens.runs.reuse import write_cost
from birthlens.runs.seal import BLANK, digest_of


def reseal(path: Any, change: Any = lambda header: None) -> None:
    """Edit the header of a run, and give all its files the digests that they would have been written with."""
    header = json.loads((path / HEADER).read_text())
    header.pop("digest")
    change(header)
    header["files"] = {name: digest_of((path / name).read_bytes()) for name in (TABLES, CONSTANTS)}
    seal = write_header(path, header)

    def rewrite(file: Any, name: Any, **notes: Any) -> None:
        tensors, metadata = load_with_metadata(file)
        if notes:
            metadata["notes"] = json.dumps({**json.loads(metadata["notes"]), **notes})
        save_tensors(file, tensors, {**metadata, "digest": BLANK}, lambda data: seal.sealed(name, data))

    for step in listed_steps(path):
        rewrite(checkpoint_file(path, step), checkpoint_name(step))
    if (path / METRICS).exists():
        rows = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
        lines, _ = lines_of(rows, seal)
        (path / METRICS).write_bytes(lines)
        if (path / RESUME).exists():
            step = json.loads(load_with_metadata(path / RESUME)[1]["notes"])["step"]
            _, end = lines_of([row for row in rows if row["step"] <= step], seal)
            rewrite(path / RESUME, RESUME, metrics=end)
    if (path / COST).exists():
        cost = json.loads((path / COST).read_text())
        write_cost(path, (cost["seconds"], cost["cpu_seconds"]))


def replace(path: Any, name: Any, tensors: Any, notes: Any = None) -> None:
    """Write other tensors into a safetensors file of a run, and reseal the run; `notes` replaces those of a state."""
    metadata = load_with_metadata(path / name)[1]
    metadata.pop("digest", None)
    if notes is not None:
        metadata["notes"] = notes
    save_tensors(path / name, tensors, metadata)
    reseal(path)
