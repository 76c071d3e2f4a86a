"""What a report says in words: a lead for each section, from the run's own numbers, and a glossary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from birthlens.labels import counted, in_words, label, legible
from birthlens.runs.run import Run
from birthlens.viz.attention_frames import AttentionFrames
from birthlens.viz.html import escape
from birthlens.viz.report.charts import number
from birthlens.viz.report.numbers import REACHED, Facts, first_above

if TYPE_CHECKING:
    import pandas as pd

TABLE_SOURCES = {
    "embedded": "the character bigrams of Shakespeare",
    "text": "the bigrams of a text",
    "counts": "a table of bigrams",
    "markov": "a synthetic Markov chain",
}
MOST_NAMED = 3
UNSEEN = 0.0005
"""A smaller change is none at three decimals."""

GLOSSARY = (
    ("trigger, output", "A trigger is a token whose usual successor is overridden in a sequence: the output, a new one for "
     "each sequence, follows it every time."),
    ("in-context target", "What follows a trigger from its second time on: known from the context, and from nothing else."),
    ("global target", "What follows a token that is no trigger: it obeys the bigrams of the corpus."),
    ("absorbed", "Positions from which the sequence runs through triggers indefinitely, because an output is itself a "
     "trigger; copying is easy there, so the accuracy is also given without them."),
    ("previous-token memory", "In layer 0: a position looks for the position before it."),
    ("trigger memory", "In layer 1: a trigger looks for the place that comes right after its earlier self."),
    ("output memory", "In layer 1: attending to a token raises the probability of predicting that token."),
    ("recall", "The share of a memory's queries whose right entry scores highest among n candidates. It is read from the "
     "weights alone, and chance is that of a random choice."),
    ("uniform, unigram, bigram", "Predictors that know nothing, the frequencies of tokens, or what follows each token in "
     "the corpus."),
    ("bag of tokens", "A predictor that knows which tokens a sequence holds and how often, but not in what order."),
    ("Bayes-optimal", "The predictor that knows the task and all of the context. On average none beats it over all "
     "positions together; at one kind of position alone another may."),
    ("head, queries, keys, values", "A head lets each position look back: its queries are compared with the keys of earlier "
     "positions, and the values of those that match are added."),
    ("edge", "What one part of the model writes, as one other part reads it."),
)  # fmt: skip
"""Words of the report and what they mean."""


def glossary() -> str:
    """Return the words of the report as a list that can be folded out."""
    items = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in GLOSSARY)
    return f"<details><summary>Words</summary><dl>{items}</dl></details>"


def trained(run: Run) -> str:
    """Say what was trained, on what, to do what."""
    config = run.config
    statistics = run.statistics
    model = config.model
    heads = f"{counted(model.n_layers, 'layer')} with {counted(model.n_heads, 'head')} each"
    labels = [legible(token) for token in statistics.vocab]
    said = run.task.story(TABLE_SOURCES[config.corpus.source], labels)
    scored = "Only these in-context targets were trained on." if config.training.loss == "in_context" else ""
    return (
        f"A {model.family} transformer of {heads} (width {model.d_model}) was trained to predict the next token in "
        f"sequences {said} {scored}"
    ).strip()


def birth(facts: Facts) -> str:
    """Say when the model learned to copy, and beside what that is to be seen."""
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
            said.append(f"That {verb} a bag of tokens reaches without any order ({number(bag)}).")
    _, loss = facts.series("global_loss")
    if loss:
        moved = "falls" if loss[-1] < loss[0] else "rises"
        why = "" if facts.run.config.training.loss == "all" else ", on targets it was not trained on"
        said.append(f"Global loss {moved} from {number(loss[0])} to {number(loss[-1])}{why}.")
    return " ".join(said)


def exceeded(names: Sequence[str], facts: Sequence[Facts]) -> str:
    """Say at which step each of several runs first exceeds the accuracy that counts as learned."""
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
    """Say what the three memories do together, and in which order they pass the middle between chance and all right."""
    passed: list[tuple[int, str]] = []
    never: list[str] = []
    for memory in ("output_memory", "trigger_memory", "prev_token_memory"):
        read = facts.readings(memory)
        if not read:
            continue
        steps, values, chance = facts.recall_series(memory, read[0])
        above = first_above(steps, values, (1 + chance) / 2)
        name = f"the {label(memory)} ({facts.queries(memory, read[0])})"
        if above is None:
            never.append(name)
        else:
            passed.append((above, f"{name} at step {above}"))
    order = ", ".join(name for _, name in sorted(passed))
    said = (
        "Three memories together can copy what followed a trigger. The previous-token memory notes at each place which "
        "token stands before it; the trigger memory lets a returning trigger look for the place so noted; the output memory "
        "predicts the token that stands there."
    )
    if passed:
        said += f" Their recall passes the middle between chance and all right in this order: {order}."
    if never:
        said += f" Not so far: {', '.join(never)}."
    return said


def heads(table: pd.DataFrame) -> str:
    """Say what removing a head costs at the last step; the table is that of `evidence.changes`."""
    last = table[table["step"] == table["step"].max()]
    last = last.reindex(last["change"].abs().sort_values(ascending=False, kind="stable").index)
    step = int(last["step"].iloc[0])
    if last["change"].abs().max() < UNSEEN:
        return f"No head matters at step {step}: taking out any one leaves in-context accuracy as it is."
    named = [
        f"{signed(float(row['change']))} without {in_words(str(row['ablated']))}"
        for row in last.head(MOST_NAMED).to_dict("records")
    ]
    return f"Taking one head out at step {step} changes in-context accuracy by {', '.join(named)}."


def edges(table: pd.DataFrame) -> str:
    """Say which edges matter; the table is that of `evidence.changes` at one step."""
    clear = table[(table["change_low"] > 0) | (table["change_high"] < 0)]
    tested = counted(len(table), "edge")
    if clear.empty:
        return f"No edge matters: of the {tested} tested none has a 95 % interval without 0."
    clear = clear.reindex(clear["change"].abs().sort_values(ascending=False, kind="stable").index)
    strongest = clear.iloc[0]
    return (
        f"{len(clear)} of the {tested} tested matter (their 95 % intervals leave 0 out), most of all "
        f"{in_words(str(strongest['ablated']))} ({signed(float(strongest['change']))})."
    )


def attention(frames: AttentionFrames) -> str:
    """Say which head looks one place back, and which one looks at what followed a trigger earlier, at the last step."""
    patterns = frames.patterns[-1]
    n = len(frames.tokens)
    back = np.stack([np.diagonal(pattern, -1) for pattern in patterns]).mean(1) if n > 1 else np.zeros(len(patterns))
    head = frames.heads[int(back.argmax())]
    said = f"On this sequence, at step {frames.steps[-1]}, {head} looks most at the token before "
    said += f"({back.max():.2f} of its attention on average)"
    copied = np.zeros((n, n), dtype=bool)
    for t, roles in enumerate(frames.roles):
        if "in_context" in roles:
            copied[t, 1 : t + 1] = [token == frames.tokens[t] for token in frames.tokens[:t]]
    returning = copied.any(1)
    if returning.any():
        share = np.where(copied, patterns, 0.0).sum(-1)[:, returning].mean(1)
        said += (
            f"; where a trigger returns, {frames.heads[int(share.argmax())]} looks most at what followed it earlier "
        )
        said += f"({share.max():.2f})"
    return f"{said}."


def signed(value: float) -> str:
    """Spell a change with its sign.

    Example:
        >>> signed(-0.5), signed(0.0)
        ('-0.500', '0.000')
    """
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text
