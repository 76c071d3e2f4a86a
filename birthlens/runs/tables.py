"""tables.safetensors: the global chain of the task, validated before anything is drawn from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from birthlens.config.run import RunConfig
from birthlens.config.task import TaskConfig
from birthlens.errors import BirthlensError
from birthlens.labels import shown
from birthlens.model.weights import load_tensors
from birthlens.runs.files import TABLES
from birthlens.runs.header import check_of
from birthlens.tasks.corpus import BigramStatistics

Array = np.ndarray
_ROUNDING = 1e-9
"""The largest difference of a distribution's sum from 1."""


def read_tables(path: Path, header: Mapping[str, Any], config: RunConfig) -> dict[str, Array]:
    """Read `unigram`, `bigram` and, if they are fixed, `triggers`.

    Raises:
        BirthlensError: if the file is damaged, or does not contain what the config and the vocabulary require.
    """
    file = path / TABLES
    tables = load_tensors(file, check_of(header, TABLES))
    if reason := table_fault(tables, tuple(header["vocab"]), config):
        raise BirthlensError(f"{file} {reason}; the run is damaged.")
    return tables


def tables_of(statistics: BigramStatistics) -> dict[str, Array]:
    """Return the tables of a chain in the form in which they are saved, including a text's ids and its tokenizer."""
    tables: dict[str, Array] = {"unigram": statistics.unigram, "bigram": statistics.bigram}
    if statistics.stream is not None:
        tables["stream"] = statistics.stream.astype(np.int32)
    if statistics.tokenizer:
        tables["tokenizer"] = np.frombuffer(statistics.tokenizer.encode(), dtype=np.uint8)
    return tables


def statistics_in(tables: Mapping[str, Array], vocab: tuple[str, ...]) -> BigramStatistics:
    """Return the chain in tables that `read_tables` has checked."""
    stream = tables["stream"].astype(np.int64) if "stream" in tables else None
    tokenizer = tables["tokenizer"].tobytes().decode() if "tokenizer" in tables else ""
    return BigramStatistics(vocab, tables["unigram"], tables["bigram"], stream=stream, tokenizer=tokenizer)


def table_fault(tables: Mapping[str, Array], vocab: tuple[str, ...], config: RunConfig) -> str | None:
    """Return what is wrong with tables, or None if they are valid."""
    n = len(vocab)
    shapes: dict[str, tuple[int, ...]] = {"unigram": (n,), "bigram": (n, n)}
    if missing := [name for name in shapes if name not in tables]:
        return f"lacks the table {missing[0]}"
    text = config.task.tables
    if missing := [name for name in text if name not in tables]:
        return f"lacks the table {missing[0]}"
    if unknown := [name for name in tables if name not in (*shapes, *text, "triggers")]:
        return f"also holds {shown(unknown)}, which is not a table"
    if text and (reason := _text_fault(tables, n)):
        return reason
    for name, shape in shapes.items():
        table = tables[name]
        if table.shape != shape:
            return f"has a {name} of shape {table.shape} for {n} tokens, not {shape}"
        if table.dtype != np.float64:
            return f"has a {name} in {table.dtype}, not float64"
        if not np.isfinite(table).all() or (table < 0).any():
            return f"has a {name} with entries that are negative or not finite"
        if (np.abs(table.sum(-1) - 1) > _ROUNDING).any():
            return f"has a {name} whose probabilities do not sum to 1"
    return _trigger_fault(tables, vocab, config)


def _text_fault(tables: Mapping[str, Array], n: int) -> str | None:
    stream = tables["stream"]
    if stream.ndim != 1 or stream.dtype != np.int32 or not len(stream):
        return f"has a stream of shape {stream.shape} in {stream.dtype}, not a list of int32"
    if stream.min() < 0 or stream.max() >= n:
        return f"has a stream with ids from {stream.min()} to {stream.max()} for {n} tokens"
    if "tokenizer" in tables:
        data = tables["tokenizer"]
        if data.ndim != 1 or data.dtype != np.uint8:
            return f"has a tokenizer of shape {data.shape} in {data.dtype}, not bytes"
        try:
            data.tobytes().decode()
        except UnicodeDecodeError:
            return "has a tokenizer that is not UTF-8 text"
    return None


def _trigger_fault(tables: Mapping[str, Array], vocab: tuple[str, ...], config: RunConfig) -> str | None:
    triggers = tables.get("triggers")
    if triggers is not None:
        if triggers.ndim != 1 or triggers.dtype != np.int64:
            return f"has triggers of shape {triggers.shape} in {triggers.dtype}, not a list of int64"
        n = len(vocab)
        if ((triggers < 0) | (triggers >= n)).any() or len(set(triggers.tolist())) != len(triggers):
            return f"has triggers that are not distinct tokens from 0 to {n - 1}"
    task = config.task
    if isinstance(task, TaskConfig):
        if (triggers is None) != (task.triggers == "random"):
            return f"{'lacks' if triggers is None else 'has'} triggers, but task.triggers = {task.triggers!r}"
        statistics = BigramStatistics(vocab, tables["unigram"], tables["bigram"])
        expected = statistics.most_frequent(task.n_triggers, task.offset)
        if triggers is not None and not np.array_equal(triggers, expected):
            return f"has triggers {triggers.tolist()}, but the most frequent tokens are {expected.tolist()}"
    return None
