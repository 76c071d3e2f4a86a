"""The matrices of the paper's model, with the codebooks and families of associations for the ledger of each."""

from __future__ import annotations

from collections.abc import Sequence

from birthlens.analysis.memories.circuits import (
    INDUCTION_HEAD,
    PREV_TOKEN_HEAD,
    feed_forward_memory,
    ov_circuit,
    positions,
    qk_circuit,
    successors,
    tokens,
    unembedding,
)
from birthlens.analysis.memories.ledger import Family, Ledger
from birthlens.analysis.memories.memory import Array, Circuit
from birthlens.analysis.memories.recall import Association
from birthlens.errors import BirthlensError
from birthlens.model.sites import Head
from birthlens.model.weights import Weights
from birthlens.shapes import Float


def paper_circuits(
    weights: Weights, prev_token_head: Head = PREV_TOKEN_HEAD, induction_head: Head = INDUCTION_HEAD
) -> dict[str, Circuit]:
    """Return the circuits of the paper's memories by role, including a linear feed-forward if there is one."""
    found = {
        "prev_token_memory": qk_circuit(weights, prev_token_head),
        "trigger_memory": qk_circuit(weights, induction_head),
        "output_memory": ov_circuit(weights, induction_head),
    }
    if f"L{weights.n_layers - 1}.W_F" in weights:
        found["feed_forward_memory"] = feed_forward_memory(weights).circuit
    return found


def paper_ledgers(
    weights: Weights,
    triggers: Sequence[int] | None = None,
    prev_token_head: Head = PREV_TOKEN_HEAD,
    induction_head: Head = INDUCTION_HEAD,
    cells: bool = True,
    bigram: Float[Array, "d_vocab d_vocab"] | None = None,
) -> dict[str, tuple[Circuit, Ledger]]:
    """Return the matrices of the paper's model, each with its ledger.

    prev_token_memory: tokens and positions on both sides; previous, same and next position, same token.
    trigger_memory: tokens and positions, with remapped tokens on the key side; triggers (or all tokens) to their remapped
    selves, the other tokens likewise, same token.
    output_memory: tokens, positions, remapped tokens against the unembedding; copying of tokens, copying of remapped tokens.
    feed_forward_memory, if it is linear and `bigram` is given: the same inputs against the unembedding and the `successors`
    of every token (which lie in its span, so the two cells share equally what both explain); each token to its successors,
    copying of tokens.

    With `cells=False` there are only these associations, and everything else is residual.
    """
    words = tokens(weights)
    places = positions(weights)
    readout = unembedding(weights)
    remapped = words.through(ov_circuit(weights, prev_token_head))
    count = len(words)
    context = len(places)
    same = Association.identity(count)
    if context < 3:
        raise BirthlensError(f"ledger: telling neighbours apart needs 3 positions, and the context has {context}.")
    next_one = Association.of(((t, t + 1) for t in range(context - 1)), name="next")
    kept = list(range(count)) if triggers is None else list(triggers)
    others = sorted(set(range(count)) - set(kept))
    trigger_families = [
        Family(name, words.name, remapped.name, Association.identity(count, chosen))
        for name, chosen in (("triggers" if triggers is not None else "remapped self", kept), ("other tokens", others))
        if chosen
    ]
    copy = Family("copy", words.name, readout.name, same)
    ledgers = {
        "prev_token_memory": Ledger(
            [words, places],
            [words, places],
            [
                Family("previous position", places.name, places.name, Association.shift(context)),
                Family("same position", places.name, places.name, Association.identity(context)),
                Family("next position", places.name, places.name, next_one),
                Family("same token", words.name, words.name, same),
            ],
            cells,
        ),
        "trigger_memory": Ledger(
            [words, places],
            [words, places, remapped],
            [*trigger_families, Family("same token", words.name, words.name, same)],
            cells,
        ),
        "output_memory": Ledger(
            [words, places, remapped],
            [readout],
            [copy, Family("copy remapped", remapped.name, readout.name, same)],
            cells,
        ),
    }
    circuits = paper_circuits(weights, prev_token_head, induction_head)
    if bigram is not None and "feed_forward_memory" in circuits:
        following = successors(weights, bigram)
        families = [Family("successors", words.name, following.name, same), copy]
        ledgers["feed_forward_memory"] = Ledger([words, places, remapped], [readout, following], families, cells)
    return {name: (circuits[name], ledger) for name, ledger in ledgers.items()}
