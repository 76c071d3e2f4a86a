"""Weight patching between model directories: parts of one checkpoint in the model of another, and what it then does.

Parts are named by layer, as Transformers names the modules of every architecture:

    L0.attention, L0.mlp, L0.norms, ...    all parameters of that part of a layer
    embeddings                             those of tokens and positions, and of the unembedding
    final_norm                             what is left outside the layers

Several parts joined by + are moved together. `weight_patching` does the same for runs, matrix by matrix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from birthlens.analysis.interventions.weight_patching import chosen_among
from birthlens.errors import BirthlensError
from birthlens.model.directory import load_causal
from birthlens.tasks.batch import TokenBatch
from birthlens.tasks.positions import check_tokens
from birthlens.tasks.roles import losses, summary

if TYPE_CHECKING:
    import pandas as pd

_LAYER = re.compile(r"\.(\d+)\.(.*)")
CHUNK = 16


def part_of(name: str) -> str:
    """Return the part that a parameter of Transformers belongs to.

    Example:
        >>> part_of("gpt_neox.layers.3.attention.dense.weight"), part_of("transformer.wpe.weight")
        ('L3.attention', 'embeddings')
    """
    found = _LAYER.search(name)
    if found is None:
        is_embedding = "norm" not in name and any(word in name for word in ("embed", "wte", "wpe", "lm_head"))
        return "embeddings" if is_embedding else "final_norm"
    inner = found[2]
    is_norm = "norm" in inner or inner.startswith("ln_")
    return f"L{found[1]}." + ("norms" if is_norm else "attention" if "att" in inner else "mlp")


def directory_patching_table(
    directories: Mapping[int, Path],
    batch: TokenBatch,
    parts: Sequence[str] | None = None,
    from_steps: Sequence[int] | None = None,
    to_steps: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Give parts of every checkpoint to the model of every other one; two models are in memory at a time.

    `parts` are by default those with matrices. Columns: matrix (the parts), from_step, to_step, metric, value, change (from
    the model untouched, which is the diagonal), drift (relative distance of the embeddings), n.

    Raises:
        BirthlensError: for unknown parts or steps, and checkpoints of other shapes.
    """
    import pandas as pd

    rows: list[tuple[Any, ...]] = []
    for to_step in chosen_among("to_steps", to_steps, directories):
        model = load_causal(directories[to_step]).to(batch.device)
        check_tokens(batch, int(model.config.vocab_size), batch.tokens.shape[1])
        own = dict(model.named_parameters())
        groups = _groups(list(own), parts)
        untouched = _measured(model, batch)
        for from_step in chosen_among("from_steps", from_steps, directories):
            donor = dict(load_causal(directories[from_step]).to(batch.device).named_parameters())
            _check_shapes(own, donor, directories[to_step], directories[from_step])
            drift = _drift(donor, own)
            for group, names in groups.items():
                found = untouched if from_step == to_step else _patched(model, own, donor, names, batch)
                for (role, quantity), (value, n) in found.items():
                    change = value - untouched[role, quantity][0]
                    rows.append((group, from_step, to_step, f"{role}_{quantity}", value, change, drift, n))
    order = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: (order.index(row[0]), row[1], row[2]))
    return pd.DataFrame(rows, columns=["matrix", "from_step", "to_step", "metric", "value", "change", "drift", "n"])


def _groups(names: Sequence[str], parts: Sequence[str] | None) -> dict[str, list[str]]:
    known = dict.fromkeys(part_of(name) for name in names)
    wanted = [part for part in known if "norm" not in part] if parts is None else list(parts)
    groups = {}
    for text in wanted:
        pieces = [piece.strip() for piece in text.split("+")]
        if unknown := [piece for piece in pieces if piece not in known]:
            raise BirthlensError(f"matrices = {unknown[0]!r}: the model's parts are {', '.join(known)}.")
        groups[text] = [name for name in names if part_of(name) in pieces]
    return groups


def _patched(
    model: Any, own: Mapping[str, Tensor], donor: Mapping[str, Tensor], names: Sequence[str], batch: TokenBatch
) -> dict[tuple[str, str], tuple[float, int]]:
    kept = {name: own[name].clone() for name in names}
    try:
        for name in names:
            own[name].copy_(donor[name])
        return _measured(model, batch)
    finally:
        for name, value in kept.items():
            own[name].copy_(value)


@torch.no_grad()
def _measured(model: Any, batch: TokenBatch) -> dict[tuple[str, str], tuple[float, int]]:
    found = []
    for part in batch.chunks(CHUNK):
        logits = model(part.tokens, use_cache=False).logits
        found.append((losses(logits, part.targets), logits.argmax(-1)))
    loss, prediction = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    return summary(loss, prediction, batch)


def _drift(donor: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> float:
    names = [name for name in own if part_of(name) == "embeddings"]
    apart = sum(float((donor[name] - own[name]).cpu().double().square().sum()) for name in names)
    return float((apart / sum(float(own[name].cpu().double().square().sum()) for name in names)) ** 0.5)


def _check_shapes(own: Mapping[str, Tensor], donor: Mapping[str, Tensor], to: Path, source: Path) -> None:
    for name in {*own, *donor}:
        if name not in own or name not in donor or own[name].shape != donor[name].shape:
            raise BirthlensError(
                f"{source} and {to} differ in the shape of {name}; weights move between equal shapes only."
            )
