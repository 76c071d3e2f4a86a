"""Codebooks, circuits and memories against dense linear algebra."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from birthlens.analysis.memories import memory as memories
from birthlens.analysis.memories.duals import dual_vectors
from birthlens.analysis.memories.memory import AssociativeMemory, Circuit, Codebook
from birthlens.analysis.memories.recall import Association, readings
from birthlens.errors import BirthlensError


def book(vectors: np.ndarray, name: str = "W_E", **fields: Any) -> Codebook:
    return Codebook(name, vectors, tuple(f"{name}{i}" for i in range(vectors.shape[-2])), **fields)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_dual_vectors_are_the_rows_of_the_transposed_pseudo_inverse(entries: int, width: int, seed: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((2, entries, width))
    expected = np.linalg.pinv(vectors).swapaxes(-1, -2)
    np.testing.assert_allclose(dual_vectors(vectors), expected, atol=1e-6 * np.abs(expected).max())


def test_dual_vectors_of_a_rank_deficient_codebook_and_of_a_tall_one_in_blocks() -> None:
    generator = np.random.default_rng(0)
    low_rank = (generator.standard_normal((9, 3)) @ generator.standard_normal((3, 12))).astype(np.float32)
    expected = np.linalg.pinv(low_rank.astype(np.float64), rcond=1e-4).T
    np.testing.assert_allclose(dual_vectors(low_rank), expected, atol=1e-4)
    tall = generator.standard_normal((5000, 6))
    np.testing.assert_allclose(dual_vectors(tall), np.linalg.pinv(tall).T, atol=1e-12)


@given(st.integers(0, 1000), st.integers(2, 8), st.integers(2, 8))
@settings(max_examples=25, deadline=None)
def test_dual_reading_returns_the_planted_table_where_codebooks_are_independent(seed: int, n: int, m: int) -> None:
    generator = np.random.default_rng(seed)
    inputs, outputs = generator.standard_normal((n, 16)), generator.standard_normal((m, 16))
    table = generator.standard_normal((n, m))
    memory = AssociativeMemory(Circuit("W", inputs.T @ table @ outputs), book(inputs), book(outputs))
    np.testing.assert_allclose(memory.scores("dual"), table, atol=1e-6)
    assert not np.allclose(memory.scores("raw"), table, atol=1e-3)


def test_a_memory_may_be_there_and_invisible_raw() -> None:
    generator = np.random.default_rng(0)
    vectors = 0.2 * generator.standard_normal((40, 64)) + generator.standard_normal(64)  # all nearly parallel
    table = np.eye(40) + 0.2 * generator.standard_normal((40, 40))
    memory = AssociativeMemory(Circuit("W", vectors.T @ table @ vectors), book(vectors), book(vectors))
    recall = {basis: float(readings(memory, Association.identity(40), basis)["recall"]) for basis in ("raw", "dual")}
    assert recall["dual"] == 1 and recall["raw"] < 0.5


@given(st.integers(0, 1000), st.floats(0.1, 50))
@settings(max_examples=25, deadline=None)
def test_recall_is_invariant_to_scale_and_to_joint_rotation(seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    vectors, matrix = generator.standard_normal((10, 8)), generator.standard_normal((8, 8))
    rotation = np.linalg.qr(generator.standard_normal((8, 8)))[0]
    target = Association.identity(10)
    plain = AssociativeMemory(Circuit("W", matrix), book(vectors), book(vectors))
    turned_book, turned_matrix = book(vectors @ rotation), scale * rotation.T @ matrix @ rotation
    turned = AssociativeMemory(Circuit("W", turned_matrix), turned_book, turned_book)
    for metric in ("recall", "rank", "standardised", "signal_to_interference"):
        np.testing.assert_allclose(readings(plain, target)[metric], readings(turned, target)[metric], rtol=1e-8)


def test_factored_circuits_score_as_their_product_and_compose() -> None:
    generator = np.random.default_rng(1)
    left, right = generator.standard_normal((8, 2)), generator.standard_normal((2, 8))
    circuit = Circuit("L0H0.OV", left, right, writes="readout")
    later = Circuit("L1H0.OV", generator.standard_normal((8, 8)), writes="readout", layer=1)
    words, readout = (
        book(generator.standard_normal((5, 8))),
        book(generator.standard_normal((6, 8)), "W_U", space="readout"),
    )
    memory = AssociativeMemory(circuit.then(later), words, readout)
    np.testing.assert_allclose(memory.scores(), words.vectors @ left @ right @ later.left @ readout.vectors.T)
    assert memory.factors()[0].shape == (5, 2) and memory.name == "L0H0.OV>L1H0.OV: W_E -> W_U"
    remapped = words.through(circuit)
    np.testing.assert_allclose(remapped.vectors, words.vectors @ left @ right)
    assert (remapped.layer, remapped.labels) == (1, words.labels)


def test_a_path_reads_the_input_of_its_first_layer_and_writes_from_its_last() -> None:
    ov = [Circuit(f"L{layer}H0.OV", np.eye(4), writes="readout", layer=layer) for layer in range(4)]
    words, readout = book(np.eye(4)), book(np.eye(4), "W_U", space="readout")
    path, late = ov[0].then(ov[1]), words.through(ov[0])
    with pytest.raises(BirthlensError, match=r"L0H0\.OV>L1H0\.OV reads the input of layer 0, .* W_E>L0H0\.OV"):
        AssociativeMemory(path, late, readout)
    assert AssociativeMemory(ov[1].then(ov[2]), late, readout).scores().trace() == 4
    assert words.through(path).layer == 2
    with pytest.raises(BirthlensError, match="increasing layers"):
        ov[2].then(ov[1].then(ov[3]))  # its first head is below the one that it follows
    whole = ov[0].then(ov[1].then(ov[3]))
    assert (whole.reading_layer, whole.layer, whole.name) == (0, 3, "L0H0.OV>L1H0.OV>L3H0.OV")


def test_spectrum_against_singular_values() -> None:
    matrices = np.random.default_rng(2).standard_normal((3, 6, 4))
    circuit = Circuit("W", matrices)
    expected = [np.linalg.svd(matrix, compute_uv=False) for matrix in matrices]
    np.testing.assert_allclose(circuit.singular_values(), expected)
    np.testing.assert_allclose(circuit.effective_rank(), [(s**2).sum() ** 2 / (s**4).sum() for s in expected])
    assert Circuit("I", np.eye(7)).effective_rank() == pytest.approx(7)


PARTS = st.tuples(*[st.booleans()] * 4).filter(any)


@given(
    PARTS, st.booleans(), st.integers(1, 6), st.sampled_from([1, 9, 40, 1000]), st.integers(1, 5), st.integers(0, 99)
)
def test_blocks_are_the_pieces_of_the_table(
    moving: tuple[bool, ...], factored: bool, steps: int, entries: int, rows: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)

    def draw(moves: bool, *shape: int) -> np.ndarray:
        return generator.standard_normal((steps, *shape) if moves else shape)

    words, others = (book(draw(moves, n, 3)) for moves, n in zip(moving, (5, 6), strict=False))
    right = draw(moving[3], 2, 3) if factored else None
    memory = AssociativeMemory(Circuit("W", draw(moving[2], 3, 2 if factored else 3), right), words, others)
    queries, candidates = np.array([4, 0, 1, 3]), np.array([1, 2, 5])
    for basis in ("raw", "dual"):
        expected = memory.scores(basis)[..., queries[:, None], candidates]
        found, visits = np.full(expected.shape, np.nan), np.zeros(expected.shape)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memories, "BLOCK_ENTRIES", entries)
            patch.setattr(memories, "BLOCK_ROWS", rows)
            for where, block, scores in memory.blocks(queries, candidates, basis):
                assert scores.size <= max(entries, min(rows, 4) * 3)
                place: Any = (*where, ..., block, slice(None))
                found[place] = scores
                visits[place] += 1
        assert found.shape == (*memory.steps, 4, 3) and (visits == 1).all()
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("side", "codebook", "words"),
    [
        ("input", book(np.eye(4), "W_U", space="readout"), ["L1H0.OV", "W_U", "residual", "readout"]),
        ("output", book(np.eye(4), "W_E"), ["L1H0.OV", "W_E", "output side", "residual"]),
        ("input", book(np.eye(4), "late", layer=2), ["L1H0.OV", "late", "layer 1", "layer 2"]),
        ("input", book(np.eye(3), "narrow"), ["L1H0.OV", "narrow", "4 dimensions", "has 3"]),
    ],
)
def test_a_memory_refuses_to_be_read_in_the_wrong_basis(side: str, codebook: Codebook, words: list[str]) -> None:
    circuit = Circuit("L1H0.OV", np.eye(4), writes="readout", layer=1)
    sides = {"input": book(np.eye(4)), "output": book(np.eye(4), "W_U", space="readout")} | {side: codebook}
    with pytest.raises(BirthlensError) as caught:
        AssociativeMemory(circuit, sides["input"], sides["output"])
    assert all(word in str(caught.value) for word in words)


def test_states_become_readouts_only_when_asked() -> None:
    circuit = Circuit("OV", np.eye(4), writes="readout")
    assert AssociativeMemory(circuit, book(np.eye(4)), book(np.eye(4)).as_readout()).scores().trace() == 4


def test_bad_codebooks_circuits_and_bases_are_named() -> None:
    with pytest.raises(BirthlensError, match=r"W_E: 2 labels for 3 vectors"):
        Codebook("W_E", np.eye(3), ("a", "b"))
    with pytest.raises(BirthlensError, match="not finite"):
        book(np.full((2, 2), np.nan))
    scoring, writing = Circuit("L0H0.QK", np.eye(3)), Circuit("L0H0.OV", np.eye(3), writes="readout")
    with pytest.raises(BirthlensError, match=r"L0H0\.QK scores pairs"):
        book(np.eye(3)).through(scoring)
    with pytest.raises(BirthlensError, match="increasing layers"):
        writing.then(writing)


def test_what_the_shape_checks_of_the_tests_would_catch_has_the_librarys_own_message() -> None:
    """Outside the tests nothing but the library checks; ask it in a process without their import hook."""
    check = """
import numpy as np
from birthlens.analysis.memories.circuits import feed_forward_kl
from birthlens.analysis.memories.memory import AssociativeMemory, Circuit, Codebook
from birthlens.errors import BirthlensError
book = Codebook("W_E", np.eye(3), ("a", "b", "c"))
memory = AssociativeMemory(Circuit("W", np.eye(3)), book, book)
for ask in (
    lambda: Codebook("W_E", np.ones(3), ("a", "b", "c")),
    lambda: memory.scores("whitened"),
    lambda: feed_forward_kl(np.eye(3), np.eye(3)[:2]),
):
    try:
        ask()
    except BirthlensError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "codebook W_E: vectors have shape (3,); give [entry, d].",
        "basis = 'whitened' is unknown; valid bases are raw and dual.",
        "bigram has shape (2, 3); the logits need (3, 3).",
    ]
