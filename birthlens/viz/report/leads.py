"""The sentences of a report: an introduction to each section, from the run's numbers, and a glossary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from birthlens.analysis.memories.names import MEMORIES, is_paper_model
from birthlens.labels import counted, in_words, label, legible
from birthlens.runs.run import Run
from birthlens.viz.attention_frames import AttentionFrames
from birthlens.viz.html import escape
from birthlens.viz.report.charts import number
from birthlens.viz.report.numbers import REACHED, Facts, first_above

if TYPE_CHECKING:
    import pandas as pd

CORPUS_NAMES = {
    "embedded": "the character bigrams of Shakespeare",
    "text": "the bigrams of a text",
    "counts": "a table of bigrams",
    "markov": "a synthetic Markov chain",
}
MOST_HEADS_NAMED = 3
SMALLEST_CHANGE = 0.0005
"""Smaller changes are 0 when rounded to three decimals."""

FEWEST_CANDIDATES = 4
"""With fewer candidates there is no null band."""

MEMORY_TERMS = {
    "previous-token memory": "In layer 0: a position attends to the position before it.",
    "trigger memory": "In layer 1: a trigger attends to the token after its earlier occurrence.",
    "output memory": "In layer 1: attending to a token raises the probability of predicting that token.",
    "birth": "A memory is born at the first kept step from which its score stays above that of shifted pairings: the right "
    "entry minus the mean of the others, in standard deviations, against the same table with wrong partners. "
    "`birthlens order` uses the same definition.",
}
"""Terms of reports about the two-layer model, with its three memories."""
TERMS = {
    "recall": "The share of a memory's queries whose correct entry has the highest score among n candidates. It is read "
    "from the weights alone; chance is 1/n.",
    "head, queries, keys, values": "An attention head compares the query of each position with the keys of earlier "
    "positions, and adds their values, weighted by the match.",
    "edge": "The output of one component of the model as the input of one other component.",
}
"""Terms of every report; those of the task come before them."""


def glossary(*runs: Run) -> str:
    """Return the terms of a report about some runs, as a list that can be opened."""
    terms: dict[str, str] = {}
    for run in runs:
        terms |= run.task.terms
    if any(is_paper_model(run.config.model) for run in runs):
        terms |= MEMORY_TERMS
    terms |= TERMS
    items = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in terms.items())
    return f"<details><summary>Terms</summary><dl>{items}</dl></details>"


def trained(run: Run) -> str:
    """Describe the model, the task and the training."""
    config = run.config
    statistics = run.statistics
    model = config.model
    heads = f"{counted(model.n_layers, 'layer')} with {counted(model.n_heads, 'head')} each"
    labels = [legible(token) for token in statistics.vocab]
    said = run.task.story(CORPUS_NAMES[config.corpus.source], labels)
    scored = "Only these in-context targets were trained on." if config.training.loss == "in_context" else ""
    return (
        f"A {model.family} transformer of {heads} (width {model.d_model}) was trained to predict the next token in "
        f"sequences {said} {scored}"
    ).strip()


def birth(facts: Facts) -> str:
    """Describe when the model learned to copy, and compare it with a bag of tokens."""
    headline, name = facts.headline
    steps, values = facts.series(f"{headline}_accuracy")
    said = []
    if values:
        bag = facts.reference("bag", headline, "accuracy")
        above = first_above(steps, values, REACHED)
        when = f"has not exceeded {REACHED}" if above is None else f"first exceeds {REACHED} at step {above}"
        said.append(f"{name.capitalize()} accuracy {when} and is {number(values[-1])} at step {steps[-1]}.")
        if math.isfinite(bag):
            verb = "is more than" if values[-1] > bag else "is not more than"
            said.append(f"That {verb} a bag of tokens, which ignores order, can reach ({number(bag)}).")
    _, loss = facts.series("global_loss")
    if loss:
        first = number(loss[0])
        last = number(loss[-1])
        moved = "falls" if loss[-1] < loss[0] else "rises"
        moved = f"stays at {last}" if first == last else f"{moved} from {first} to {last}"
        why = "" if facts.run.config.training.loss == "all" else ", on targets it was not trained on"
        said.append(f"Global loss {moved}{why}.")
        uniform = facts.reference("uniform", "global", "loss")
        if loss[-1] > uniform:
            said.append(f"It is now above that of uniform guessing ({number(uniform)}).")
    return " ".join(said)


def exceeded(names: Sequence[str], facts: Sequence[Facts]) -> str:
    """Describe at which step each of several runs first exceeds the accuracy that counts as learned."""
    at: list[str] = []
    never: list[str] = []
    for name, one in zip(names, facts, strict=True):
        above = first_above(*one.series(f"{one.headline[0]}_accuracy"), REACHED)
        if above is None:
            never.append(name)
        else:
            at.append(f"{name} at step {above}")
    return f"{REACHED}: " + "; ".join([", ".join(at)] * bool(at) + [f"not yet: {', '.join(never)}"] * bool(never)) + "."


def memories(facts: Facts) -> str:
    """Describe the three memories, when each was born, and when its raw recall passed halfway to 1."""
    said = (
        "Three memories together copy what followed a trigger. The previous-token memory stores at each position which "
        "token is before it; the trigger memory makes a repeated trigger attend to that position; the output memory "
        "predicts the token at that position."
    )
    if min(len(facts.run.statistics), facts.run.config.task.context - 1) >= FEWEST_CANDIDATES:
        said += f" {births(facts.births)}"
    else:
        said += " They have too few candidates to distinguish a birth from chance."
    passed: list[str] = []
    for memory in MEMORIES:
        read = facts.readings(memory)
        if not read:
            continue
        steps, values, chance = facts.recall_series(memory, read[0])
        above = first_above(steps, values, (1 + chance) / 2)
        when = "not yet" if above is None else f"at step {above}"
        passed.append(f"{label(memory)} ({facts.queries(memory, read[0])}) {when}")
    return f"{said} For comparison, raw recall first passes halfway between chance and 1: {', '.join(passed)}."


def births(onsets: pd.DataFrame) -> str:
    """Describe in which order the memories of a run are born; onsets at one step are called a tie.

    `onsets` has columns memory and onset, as `order_tables.chosen_sets` returns them for one run.

    Example:
        >>> import pandas as pd
        >>> births(pd.DataFrame({"memory": ["output_memory", "trigger_memory"], "onset": [10.0, 50.0]}))
        'Births: the output memory at step 10, the trigger memory at step 50.'
    """
    at: dict[float, list[str]] = {}
    never: list[str] = []
    for memory, step in zip(onsets["memory"], onsets["onset"], strict=True):
        if math.isnan(step):
            never.append(f"the {label(str(memory))}")
        else:
            at.setdefault(float(step), []).append(f"the {label(str(memory))}")
    parts = [
        f"{' and '.join(names)} at step {step:.0f}{' (a tie)' if len(names) > 1 else ''}"
        for step, names in sorted(at.items())
    ]
    parts += [f"not yet {' or '.join(never)}"] if never else []
    return f"Births: {', '.join(parts)}."


def heads(table: pd.DataFrame) -> str:
    """Describe the effect of ablating each head at the last step; the table is that of `causal_tables.changes_table`."""
    last = table[table["step"] == table["step"].max()]
    last = last.reindex(last["change"].abs().sort_values(ascending=False, kind="stable").index)
    step = int(last["step"].iloc[0])
    if last["change"].isna().all():
        return f"The sequences contain no in-context target, so nothing can be said about the heads at step {step}."
    if last["change"].abs().max() < SMALLEST_CHANGE:
        return f"No head matters at step {step}: ablating any one leaves in-context accuracy unchanged."
    named = [
        f"{signed(float(row['change']))} without {in_words(str(row['ablated']))}"
        for row in last.head(MOST_HEADS_NAMED).to_dict("records")
    ]
    return f"Ablating one head at step {step} changes in-context accuracy by {', '.join(named)}."


def edges(table: pd.DataFrame) -> str:
    """Describe which edges matter; the table is that of `causal_tables.changes_table` at one step."""
    clear = table[(table["change_low"] > 0) | (table["change_high"] < 0)]
    tested = counted(len(table), "edge")
    if table["change"].isna().all():
        return "The sequences contain no in-context target, so nothing can be said about the edges."
    if table["change_low"].isna().all():
        largest = table.iloc[int(table["change"].abs().argmax())]
        return (
            f"The largest effect among the {tested} tested is that of {in_words(str(largest['ablated']))} "
            f"({signed(float(largest['change']))}); there are too few sequences for an interval."
        )
    if clear.empty:
        return f"No edge matters: the 95 % interval of each of the {tested} tested contains 0."
    clear = clear.reindex(clear["change"].abs().sort_values(ascending=False, kind="stable").index)
    strongest = clear.iloc[0]
    return (
        f"{len(clear)} of the {tested} tested matter (their 95 % intervals exclude 0). The largest effect is that of "
        f"{in_words(str(strongest['ablated']))} ({signed(float(strongest['change']))})."
    )


def attention(frames: AttentionFrames) -> str:
    """Describe which head attends to the previous token, and which to the earlier output of a trigger, at the last step."""
    patterns = frames.patterns[-1]
    n = len(frames.tokens)
    back = np.stack([np.diagonal(pattern, -1) for pattern in patterns]).mean(1) if n > 1 else np.zeros(len(patterns))
    head = frames.heads[int(back.argmax())]
    said = f"On this sequence, at step {frames.steps[-1]}, {head} attends most to the previous token "
    said += f"({back.max():.2f} of its attention on average)"
    copied = np.zeros((n, n), dtype=bool)
    for t, roles in enumerate(frames.roles):
        if "in_context" in roles:
            copied[t, 1 : t + 1] = [token == frames.tokens[t] for token in frames.tokens[:t]]
    returning = copied.any(1)
    if returning.any():
        share = np.where(copied, patterns, 0.0).sum(-1)[:, returning].mean(1)
        said += (
            f"; at repeated triggers, {frames.heads[int(share.argmax())]} attends most to what followed the trigger "
        )
        said += "earlier "
        said += f"({share.max():.2f})"
    return f"{said}."


def signed(value: float) -> str:
    """Format a change with its sign.

    Example:
        >>> signed(-0.5), signed(0.0), signed(float("nan"))
        ('-0.500', '0.000', '-')
    """
    if math.isnan(value):
        return "-"
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text
