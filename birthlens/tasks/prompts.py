"""Prompts of a user: sentences or ids, optionally with corrupted versions and answers, read from JSON or YAML.

    prompts:
      - text: "When Mary and John went to the store, John gave a drink to"
        corrupted: "When Mary and John went to the store, Mary gave a drink to"
        answer: " Mary"
        wrong: " John"
      - text: [5, 3, 9, 5]        # ids stand wherever text does; an id is the answer of one token

Only `text` is needed. Answers are one token each. Prompts are padded at the end, which does not affect a causal model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from birthlens.errors import BirthlensError
from birthlens.labels import shown
from birthlens.reading import read_mapping
from birthlens.shapes import Bool, Int
from birthlens.tasks.batch import TokenBatch

Encode = Callable[[str], list[int]]
MOST = 10_000
"""Prompts of one file."""
_KEYS = ("text", "corrupted", "answer", "wrong")


@dataclass(frozen=True)
class Prompt:
    """The ids of a prompt and of its corrupted version, the right next token and a wrong one; None where not given."""

    text: tuple[int, ...]
    corrupted: tuple[int, ...] | None = None
    answer: int | None = None
    wrong: int | None = None


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts as a batch, whose role `answer` is the last position of each; fields that not all of them have are None."""

    clean: TokenBatch
    corrupted: TokenBatch | None
    wrong: Int[Tensor, "batch pos"] | None
    equal_lengths: bool


def read_prompts(
    path: str | Path, encode: Encode | None, encode_answer: Encode | None, d_vocab: int, owner: str
) -> list[Prompt]:
    """Read a file of prompts; `encode` converts text, which is refused without it; `owner` is its owner in messages.

    Raises:
        BirthlensError: if the file has another form, text is given and `encode` is None, an answer is not one token, or
            an id is outside the vocabulary.
    """
    listed = read_mapping(path, "prompts").get("prompts")
    if not isinstance(listed, list) or not listed:
        raise BirthlensError(f"{path} holds no prompts; write them as a list under the key prompts.")
    if len(listed) > MOST:
        raise BirthlensError(f"{path} holds {len(listed)} prompts; at most {MOST} are allowed.")
    return [
        _read(entry, f"{path}, prompt {n}", encode, encode_answer, d_vocab, owner)
        for n, entry in enumerate(listed, start=1)
    ]


def prompt_batch(prompts: Sequence[Prompt]) -> PromptBatch:
    """Put prompts with answers into one batch.

    Raises:
        BirthlensError: if a prompt has no answer, or a corrupted version has another length than its prompt.
    """
    for n, prompt in enumerate(prompts, start=1):
        if prompt.answer is None:
            raise BirthlensError(f"prompt {n} has no answer; give the token that should come next as answer.")
        if prompt.corrupted is not None and len(prompt.corrupted) != len(prompt.text):
            raise BirthlensError(
                f"prompt {n} has {len(prompt.text)} tokens and its corrupted version {len(prompt.corrupted)}; "
                "give both the same number."
            )
    lengths = torch.tensor([len(prompt.text) for prompt in prompts])
    answers = torch.tensor([prompt.answer for prompt in prompts])
    where = torch.arange(int(lengths.max())) == lengths[:, None] - 1
    corrupted = [prompt.corrupted for prompt in prompts if prompt.corrupted is not None]
    wrong = [prompt.wrong for prompt in prompts if prompt.wrong is not None]
    whole = len(prompts)
    return PromptBatch(
        _batch([prompt.text for prompt in prompts], answers, where),
        _batch(corrupted, answers, where) if len(corrupted) == whole else None,
        torch.where(where, torch.tensor(wrong)[:, None], 0) if len(wrong) == whole else None,
        bool((lengths == lengths[0]).all()),
    )


def _batch(
    rows: Sequence[tuple[int, ...]], answers: Int[Tensor, "batch"], where: Bool[Tensor, "batch pos"]
) -> TokenBatch:
    tokens = torch.zeros(where.shape, dtype=torch.long)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    nothing = tokens.new_zeros(len(rows), 0)
    targets = torch.where(where, answers[:, None], 0)
    absorbed = torch.zeros_like(where)
    return TokenBatch(tokens, targets, nothing, nothing, torch.zeros_like(tokens), absorbed, {"answer": where})


def _read(
    entry: object, where: str, encode: Encode | None, encode_answer: Encode | None, d_vocab: int, owner: str
) -> Prompt:
    if not isinstance(entry, dict) or "text" not in entry:
        raise BirthlensError(
            f"{where} is {shown(entry, 80)}; write a mapping with text, and corrupted, answer and wrong."
        )
    if unknown := [key for key in entry if key not in _KEYS]:
        raise BirthlensError(f"{where} has the key {shown(unknown[0])}; valid are {', '.join(_KEYS)}.")

    def ids(key: str) -> tuple[int, ...] | None:
        value = entry.get(key)
        if value is None:
            return None
        reader = encode if key in ("text", "corrupted") else encode_answer
        if isinstance(value, str):
            if reader is None:
                raise BirthlensError(f"{where}: {key} is text, and {owner} has no tokenizer; give ids.")
            value = reader(value)
        found = value if isinstance(value, list) else [value]
        if not found or not all(type(one) is int and one >= 0 for one in found):
            raise BirthlensError(f"{where}: {key} = {shown(value, 80)}; give text or ids, at least one.")
        if max(found) >= d_vocab:
            raise BirthlensError(f"{where}: {key} holds id {max(found)}; the vocabulary ends at {d_vocab - 1}.")
        return tuple(found)

    def token(key: str) -> int | None:
        found = ids(key)
        if found is not None and len(found) != 1:
            raise BirthlensError(f"{where}: {key} = {shown(entry[key], 80)} is {len(found)} tokens; answers are one.")
        return None if found is None else found[0]

    text = ids("text")
    assert text is not None
    answer = token("answer")
    wrong = token("wrong")
    if wrong is not None and wrong == answer:
        raise BirthlensError(f"{where}: answer and wrong are the same token; give another one.")
    return Prompt(text, ids("corrupted"), answer, wrong)
