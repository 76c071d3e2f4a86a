"""The paper's memories on planted models, against its formulas in plain loops."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from typed import present

from birthlens.analysis.behaviour.decomposition import decompose
from birthlens.analysis.memories.circuits import (
    all_memories,
    feed_forward_kl,
    feed_forward_memory,
    output_memory,
    ov_circuit,
    positions,
    prev_token_memory,
    qk_circuit,
    tokens,
    trigger_memory,
)
from birthlens.analysis.memories.layer_norms import fold_layer_norms
from birthlens.analysis.memories.memory import AssociativeMemory
from birthlens.analysis.memories.recall import Association, readings
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.initialisation import initial_weights
from birthlens.model.sites import Head
from birthlens.model.weights import Weights, stacked

VOCABULARY, CONTEXT = 20, 24


def weights_of(seed: int = 0, **fields: Any) -> Weights:
    config = ModelConfig(**{"d_model": 64, **fields})
    return initial_weights(config, VOCABULARY, CONTEXT, np.random.default_rng(seed))


def planted(transposed: bool = False) -> Weights:
    """The paper's three sums of outer products (section 7), written in its own column orientation."""
    weights = weights_of(1, d_model=256)
    w_e, p, w_u = weights["W_E"].astype(float), weights["W_pos"].astype(float), weights["W_U"].T.astype(float)
    paper_ov = [(weights[f"L{layer}.W_V"][0] @ weights[f"L{layer}.W_O"][0]).T for layer in (0, 1)]  # W_O W_V
    w_1 = w_e @ paper_ov[0].T
    key_query_1 = np.sum([np.outer(p[t - 1], p[t]) for t in range(1, CONTEXT)], 0)
    key_query_2 = np.sum([np.outer(w_1[k], w_e[k]) for k in range(VOCABULARY)], 0)
    output = np.sum([np.outer(w_u[k], w_e[k]) for k in range(VOCABULARY)], 0)
    paper_w_v = weights["L1.W_V"][0].T.astype(float)
    # In row vectors q W_Q W_K^T k^T = k (W_K W_Q^T) q^T, so with W_Q = 1 the paper's key-query matrix is W_K.
    *w_k, output = (matrix.T if transposed else matrix for matrix in (key_query_1, key_query_2, output))
    w_o = (output @ np.linalg.inv(paper_w_v)).T
    return weights.replaced({"L0.W_K": w_k[0][None], "L1.W_K": w_k[1][None], "L1.W_O": w_o[None]})


def paper_recalls(weights: Weights, triggers: list[int]) -> dict[str, float]:
    """Section 4, letter by letter, in column vectors: products of named matrices with vectors, one argmax at a time."""
    w_e, p, w_u = weights["W_E"].astype(float), weights["W_pos"].astype(float), weights["W_U"].T.astype(float)
    q, k, v, o = ({i: weights[f"L{i}.W_{x}"][0].T.astype(float) for i in (0, 1)} for x in "QKVO")
    w_1 = [o[0] @ (v[0] @ e) for e in w_e]

    def recall(queries: list[int], candidates: list[int], score: Callable[[int, int], float], shift: int = 0) -> float:
        best = [candidates[int(np.argmax([score(c, i) for c in candidates]))] for i in queries]
        return float(np.mean([b == i - shift for b, i in zip(best, queries, strict=True)]))

    everything = list(range(VOCABULARY))
    # score = (W_K key) . (W_Q query)
    first = lambda t_key, t: float((k[0] @ p[t_key]) @ (q[0] @ p[t]))  # noqa: E731
    second = lambda key, query: float((k[1] @ w_1[key]) @ (q[1] @ w_e[query]))  # noqa: E731
    written = lambda out, into: float(w_u[out] @ (o[1] @ (v[1] @ w_e[into])))  # noqa: E731
    return {
        "prev": recall(list(range(1, CONTEXT)), list(range(CONTEXT - 1)), first, shift=1),
        "prev 8": recall(list(range(1, 8)), list(range(7)), first, shift=1),
        "trigger": recall(triggers, triggers, second),
        "output": recall(everything, everything, written),
    }


def recalls(weights: Weights, triggers: list[int]) -> dict[str, float]:
    found = {
        "prev": (prev_token_memory(weights), Association.shift(CONTEXT)),
        "prev 8": (prev_token_memory(weights, first=8), Association.shift(8)),
        "trigger": (trigger_memory(weights), Association.identity(VOCABULARY, triggers, triggers)),
        "output": (output_memory(weights), Association.identity(VOCABULARY)),
    }
    return {name: float(readings(memory, target)["recall"]) for name, (memory, target) in found.items()}


@pytest.mark.parametrize("seed", range(5))
def test_recalls_are_the_papers_on_random_weights(seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights = weights_of(seed, d_model=32)
    weak = planted_weakly(weights, generator)
    assert recalls(weak, list(range(12))) == pytest.approx(paper_recalls(weak, list(range(12))))


def planted_weakly(weights: Weights, generator: np.random.Generator) -> Weights:
    """Weights with half-hidden memories, so that recalls are neither 0 nor 1."""
    p, w_e, w_u = weights["W_pos"], weights["W_E"], weights["W_U"].T
    w_1 = w_e @ weights.ov(Head(0, 0))
    noise = generator.standard_normal((3, 32, 32)) * [[[12]], [[20]], [[0.7]]]
    w_o = np.linalg.inv(weights["L1.W_V"][0]) @ (w_e.T @ w_u + noise[2])
    return weights.replaced(
        {"L0.W_K": (p[:-1].T @ p[1:] + noise[0])[None], "L1.W_K": (w_1.T @ w_e + noise[1])[None], "L1.W_O": w_o[None]}
    )


def test_the_planted_induction_head_is_read_whole_and_its_transpose_at_chance() -> None:
    triggers = list(range(VOCABULARY))
    assert recalls(planted(), triggers) == {"prev": 1, "prev 8": 1, "trigger": 1, "output": 1}
    transposed = recalls(planted(transposed=True), triggers)
    # chance is 1 / 23, 1 / 20 and 1 / 20
    assert transposed["prev"] < 0.15 and transposed["trigger"] < 0.2 and transposed["output"] < 0.2
    backwards = prev_token_memory(planted(transposed=True))
    following = Association.of((t, t + 1) for t in range(CONTEXT - 1))
    assert readings(backwards, following)["recall"] == 1  # the same memory, of the next position


def test_reading_a_trained_key_matrix_the_paper_way_round_sits_at_chance() -> None:
    weights = planted()
    memory = trigger_memory(weights)
    keys_first = memory.scores().T  # rows: keys w_1, columns: queries; right on the diagonal all the same
    assert (keys_first.argmax(1) == np.arange(VOCABULARY)).mean() == 1
    crossed = tokens(weights).vectors @ weights.qk(Head(1, 0)).T @ memory.outputs.vectors.T
    assert (crossed.argmax(1) == np.arange(VOCABULARY)).mean() < 0.2


def test_feed_forward_kl_against_a_plain_loop() -> None:
    weights = weights_of(2, feed_forward="linear")
    bigram = np.random.default_rng(2).dirichlet(np.full(VOCABULARY, 0.3), size=VOCABULARY)
    bigram[4] = np.eye(VOCABULARY)[2]  # a certain successor: 0 log 0 = 0
    scores = feed_forward_memory(weights).scores()
    kls = []
    for j in range(VOCABULARY):
        if j in (0, 5):
            continue
        logits = weights["W_E"][j] @ weights["L1.W_F"] @ weights["W_U"]
        predicted = np.exp(logits) / np.exp(logits).sum()
        kls.append(sum(b * np.log(b / q) for b, q in zip(bigram[j], predicted, strict=True) if b > 0))
    assert float(feed_forward_kl(scores, bigram, leave_out=[0, 5])) == pytest.approx(np.mean(kls), rel=1e-4)
    assert float(feed_forward_kl(np.log(bigram + 1e-300), bigram)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(BirthlensError, match="linear"):
        feed_forward_memory(weights_of())


def test_all_memories_of_many_heads_against_explicit_products() -> None:
    weights = weights_of(3, family="full", n_layers=3, n_heads=2, d_model=16, feed_forward="relu")
    found = {item.memory.name: item for item in all_memories(weights, longest_path=3)}
    w_e, w_u, p = weights["W_E"], weights["W_U"], weights["W_pos"]
    ov = {str(head): weights.ov(head) for head in weights.heads}
    explicit = {
        "L0H1.QK: W_pos -> W_E": p @ weights.qk(Head(0, 1)) @ w_e.T,
        "L2H1.QK: W_E -> W_E>L1H0.OV": w_e @ weights.qk(Head(2, 1)) @ (w_e @ ov["L1H0"]).T,
        "L1H0.OV: W_E -> W_U": w_e @ ov["L1H0"] @ w_u,
        "L0H1.OV>L2H0.OV: W_E -> W_U": w_e @ ov["L0H1"] @ ov["L2H0"] @ w_u,
        "L0H0.OV>L1H1.OV>L2H0.OV: W_E -> W_U": w_e @ ov["L0H0"] @ ov["L1H1"] @ ov["L2H0"] @ w_u,
    }
    for name, table in explicit.items():
        np.testing.assert_allclose(found[name].memory.scores(), table, rtol=1e-3, atol=1e-4)
    # QK bases: 2 codebooks in layer 0, 2 more a layer; OV one a head; paths 12 of two heads and 8 of three.
    assert len(found) == 2 * (4 + 16 + 36) + 6 + 12 + 8
    assert present(found["L0H0.QK: W_pos -> W_pos"].association).pairs[0] == (1, 0)
    assert found["L0H0.QK: W_E -> W_pos"].association is None


def test_folding_layer_norms_keeps_the_function_and_changes_the_circuits() -> None:
    weights = weights_of(4, family="full", n_heads=2, d_model=16, feed_forward="relu")
    generator = np.random.default_rng(4)
    moved = {n: weights[n] + 0.3 * generator.standard_normal(weights[n].shape) for n in weights if n != "W_E"}
    weights = weights.replaced(moved)
    folded = fold_layer_norms(weights)
    sequence = generator.integers(VOCABULARY, size=12)
    np.testing.assert_allclose(decompose(folded, sequence).logits, decompose(weights, sequence).logits, atol=1e-9)
    assert not np.allclose(folded.qk(Head(1, 0)), weights.qk(Head(1, 0)))
    assert (folded["L0.ln1.w"] == 1).all() and (folded["ln_final.b"] == 0).all()
    constant = folded.qk(Head(0, 1)).sum(0)
    np.testing.assert_allclose(constant, 0, atol=1e-9)  # centred: what is added to every component is not seen
    simplified = weights_of()
    assert fold_layer_norms(simplified) is simplified


def test_wrong_bases_and_absent_heads_are_refused() -> None:
    weights = weights_of()
    remapped = tokens(weights).through(ov_circuit(weights, Head(0, 0)))
    with pytest.raises(BirthlensError, match=r"L0H0\.QK reads the input of layer 0"):
        AssociativeMemory(qk_circuit(weights, Head(0, 0)), tokens(weights), remapped)
    with pytest.raises(BirthlensError, match="head = L2H0 does not exist"):
        trigger_memory(weights, head=Head(2, 0))
    with pytest.raises(BirthlensError, match="rotary"):
        positions(weights_of(positions="rotary"))
    with pytest.raises(BirthlensError, match="2 labels for 20 vectors"):
        tokens(weights, labels=["a", "b"])


@pytest.mark.parametrize("moving", [["L0.W_K", "L1.W_O"], ["W_E", "W_pos", "L0.W_V", "L1.W_Q", "W_U"], []])
def test_memories_of_stacked_checkpoints_are_the_stacked_memories(moving: list[str]) -> None:
    start, generator = weights_of(feed_forward="linear"), np.random.default_rng(3)
    singles = [
        start.replaced({name: generator.standard_normal(start[name].shape, dtype=np.float32) for name in moving})
        for _ in range(3)
    ]
    together = stacked(singles)
    assert together.moving == set(moving) and start.moving == set()
    for name in start:
        kept = np.stack([single[name] for single in singles]) if name in moving else start[name]
        np.testing.assert_array_equal(together[name], kept)
    for read in (prev_token_memory, trigger_memory, output_memory, feed_forward_memory):
        expected = np.stack([read(single).scores() for single in singles])
        found = np.broadcast_to(read(together).scores(), expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    for head in together.heads:
        for circuit in (Weights.qk, Weights.ov):
            expected = np.stack([circuit(single, head) for single in singles])
            found = np.broadcast_to(circuit(together, head), expected.shape)
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_weight_wing_starts_without_torch_and_pandas() -> None:
    modules = "memory recall top_associations circuits recall_tables layer_norms ledger ledger_nulls birth_order"
    imports = "".join(f"import birthlens.analysis.memories.{name}\n" for name in modules.split())
    imports += "import birthlens.analysis.behaviour.decomposition\n"
    check = (
        "import sys\nprint([name for name in ('torch', 'transformer_lens', 'pandas', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", imports + check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
