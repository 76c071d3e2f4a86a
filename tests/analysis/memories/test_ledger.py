"""The ledger against dense least squares, brute-force Shapley values and Monte Carlo."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typed import loc

from birthlens.analysis.memories.circuits import ov_circuit, qk_circuit
from birthlens.analysis.memories.ledger import Family, Ledger, projection
from birthlens.analysis.memories.ledger_factors import Factor, factor_ledger
from birthlens.analysis.memories.ledger_nulls import NULLS, Derangements, Nulls, derangement
from birthlens.analysis.memories.ledger_tables import COLUMNS, entries_table, ledger_table, paper_ledger_table
from birthlens.analysis.memories.memory import Circuit, Codebook
from birthlens.analysis.memories.paper_ledgers import paper_circuits, paper_ledgers
from birthlens.analysis.memories.recall import Association
from birthlens.config.model import ModelConfig
from birthlens.errors import BirthlensError
from birthlens.model.initialisation import initial_weights
from birthlens.model.sites import Head


def book(name: str, vectors: np.ndarray) -> Codebook:
    return Codebook(name, vectors, tuple(f"{name}{i}" for i in range(len(vectors))))


def books(seed: int = 0, d: int = 12, words: int = 4, places: int = 5) -> tuple[Codebook, Codebook, Codebook]:
    """Three codebooks that overlap: Gaussian tokens, positions that lean on them, outputs."""
    generator = np.random.default_rng(seed)
    w = generator.standard_normal((words, d))
    p = generator.standard_normal((places, d)) + 0.7 * w[[0]]
    return book("tok", w), book("pos", p), book("out", generator.standard_normal((words, d)))


def mixed_ledger(seed: int = 0) -> Ledger:
    words, places, _ = books(seed)
    families = [
        Family("previous", "pos", "pos", Association.shift(5)),
        Family("same position", "pos", "pos", Association.identity(5)),
        Family("copy", "tok", "tok", Association.identity(4)),
    ]
    return Ledger([words, places], [words, places], families)


def design(ledger: Ledger, families: tuple[int, ...]) -> np.ndarray:
    """The giant matrix that the ledger never builds: one vectorised outer product a column."""
    columns = [
        np.outer(u, v).ravel()
        for i in families
        for u, v in zip(*ledger.outer_products(ledger.families[i]), strict=True)
    ]
    return np.array(columns).T if columns else np.zeros((ledger.u.shape[1] * ledger.v.shape[1], 0))


def explained(columns: np.ndarray, matrix: np.ndarray) -> float:
    if columns.shape[1] == 0:
        return 0.0
    fit = columns @ np.linalg.lstsq(columns, matrix.ravel(), rcond=None)[0]
    return float(fit @ fit)


@pytest.mark.parametrize("seed", range(3))
def test_associations_are_shapley_values_of_dense_least_squares(seed: int) -> None:
    ledger, matrix = mixed_ledger(seed), np.random.default_rng(seed).standard_normal((12, 12))
    shares, energy = ledger.shares(matrix), (matrix**2).sum()
    expected = dict.fromkeys(range(3), 0.0)
    for order in permutations(range(3)):
        for i, family in enumerate(order):
            gain = explained(design(ledger, order[: i + 1]), matrix) - explained(design(ledger, order[:i]), matrix)
            expected[family] += gain / energy / 6
    for i, one in enumerate(ledger.families):
        assert float(shares.associations[one.name]) == pytest.approx(expected[i], rel=1e-6, abs=1e-9)
        assert float(shares.alone[one.name]) == pytest.approx(explained(design(ledger, (i,)), matrix) / energy)
    solution = np.linalg.lstsq(design(ledger, (0, 1, 2)), matrix.ravel(), rcond=None)[0]
    np.testing.assert_allclose(np.concatenate(list(ledger.coefficients(matrix).values())), solution, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_the_grid_is_the_dense_least_squares_over_every_pair_of_its_codebooks(seed: int) -> None:
    ledger, matrix = mixed_ledger(seed), np.random.default_rng(seed).standard_normal((12, 12))
    everything = np.concatenate([b.vectors for b in ledger.inputs.values()])
    spans = np.array([np.outer(u, v).ravel() for u in everything for v in everything]).T
    shares, energy = ledger.shares(matrix), (matrix**2).sum()
    assert float(shares.residual) == pytest.approx(1 - explained(spans, matrix) / energy)
    rest = explained(spans, matrix) - explained(design(ledger, (0, 1, 2)), matrix)
    assert sum(map(float, shares.cells.values())) == pytest.approx(rest / energy)


def test_cells_are_means_over_the_orders_of_codebooks() -> None:
    words, places, out = books()
    ledger, matrix = Ledger([words, places], [out]), np.random.default_rng(1).standard_normal((12, 12))
    q = projection(out.vectors)
    tok, pos, both = (
        projection(words.vectors),
        projection(places.vectors),
        projection(np.vstack([words.vectors, places.vectors])),
    )

    def norm(p: np.ndarray) -> float:
        return float(((p @ matrix @ q) ** 2).sum() / (matrix**2).sum())

    expected = 0.5 * norm(tok) + 0.5 * (norm(both) - norm(pos))
    assert float(ledger.shares(matrix).cells["tok x out"]) == pytest.approx(expected)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_shares_add_up_and_are_not_negative(seed: int, in_float32: bool) -> None:
    matrices = np.random.default_rng(seed).standard_normal((2, 12, 12))
    shares = mixed_ledger(seed).shares(matrices.astype(np.float32) if in_float32 else matrices)
    parts = [*shares.associations.values(), *shares.cells.values(), shares.residual]
    np.testing.assert_allclose(np.sum(parts, axis=0), 1, atol=1e-9)
    assert min(part.min() for part in (*shares.cells.values(), shares.residual)) >= -1e-9


def test_a_planted_mixture_of_memories_is_recovered() -> None:
    ledger, generator = mixed_ledger(), np.random.default_rng(5)
    coefficients = generator.standard_normal((3, 5))
    p, tok = ledger.inputs["pos"].vectors, ledger.inputs["tok"].vectors
    planted = sum(coefficients[0, t - 1] * np.outer(p[t], p[t - 1]) for t in range(1, 5))
    planted = planted + sum(coefficients[2, k] * np.outer(v, v) for k, v in enumerate(tok))
    found, shares = ledger.coefficients(planted), ledger.shares(planted)
    np.testing.assert_allclose(found["previous"], coefficients[0, :4], atol=1e-8)
    np.testing.assert_allclose(found["copy"], coefficients[2, :4], atol=1e-8)
    np.testing.assert_allclose(found["same position"], 0, atol=1e-8)
    assert float(shares.residual) == pytest.approx(0, abs=1e-9)
    assert sum(map(float, shares.cells.values())) == pytest.approx(0, abs=1e-9)
    # Half of the energy from elsewhere is called residual or cells, not memory.
    noise = generator.standard_normal((12, 12))
    outside = noise - sum(ledger.input_parts.values()) @ noise @ sum(ledger.output_parts.values())
    outside *= np.linalg.norm(planted) / np.linalg.norm(outside)
    assert float(ledger.shares(planted + outside).residual) == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_nothing_but_coefficients_depends_on_the_length_of_the_vectors(scale: float) -> None:
    """The span of a family does not, so shares do not; coefficients are in units of its outer products."""
    plain, generator = mixed_ledger(), np.random.default_rng(4)
    lengths = {"tok": scale ** generator.uniform(0, 1, 4), "pos": scale ** generator.uniform(0, 1, 5)}
    lengths["tok"][0], lengths["pos"][0] = scale, 1
    stretched = {name: book(name, plain.inputs[name].vectors * by[:, None]) for name, by in lengths.items()}
    other = Ledger(list(stretched.values()), list(stretched.values()), plain.families)
    matrices = generator.standard_normal((3, 12, 12)) + 3 * plain.inputs["tok"].vectors.T @ plain.inputs["tok"].vectors
    found, expected = other.shares(matrices), plain.shares(matrices)
    for kind in ("associations", "alone", "cells"):
        for name, share in getattr(expected, kind).items():
            np.testing.assert_allclose(getattr(found, kind)[name], share, atol=1e-9)
    np.testing.assert_allclose(found.residual, expected.residual, atol=1e-9)
    for family in plain.families:
        by = lengths[family.inputs][family.association.queries] * lengths[family.outputs][family.association.right]
        np.testing.assert_allclose(
            other.coefficients(matrices)[family.name] * by,
            plain.coefficients(matrices)[family.name],
            rtol=1e-6,
            atol=1e-9,
        )
        draws = [Derangements.of(of, family, 5, np.random.default_rng(0)).shares(matrices) for of in (plain, other)]
        np.testing.assert_allclose(draws[0], draws[1], atol=1e-9)
    for null, shares in Nulls.of(plain).shares(matrices).items():
        for name, share in shares.items():
            np.testing.assert_allclose(Nulls.of(other).shares(matrices)[null][name], share, atol=1e-9)


def test_a_vector_of_length_zero_explains_nothing() -> None:
    tok = np.vstack([np.random.default_rng(0).standard_normal((3, 6)), np.zeros((1, 6))])
    words = book("tok", tok)
    ledger = Ledger([words], [words], [Family("copy", "tok", "tok", Association.identity(4))])
    shares = ledger.shares(tok.T @ tok)
    assert float(shares.associations["copy"]) == pytest.approx(1)
    assert ledger.coefficients(tok.T @ tok)["copy"].tolist() == pytest.approx([1, 1, 1, 0])


@pytest.mark.parametrize("seed", range(3))
def test_without_cells_all_but_the_associations_is_residual(seed: int) -> None:
    full, matrices = mixed_ledger(seed), np.random.default_rng(seed).standard_normal((3, 12, 12))
    bare = Ledger(list(full.inputs.values()), list(full.outputs.values()), full.families, cells=False)
    with_cells, without = full.shares(matrices), bare.shares(matrices)
    assert without.cells == {} and bare.cell_names == [] and len(full.cell_names) == 4
    np.testing.assert_allclose(without.residual, with_cells.residual + sum(with_cells.cells.values()))
    for name, share in with_cells.associations.items():
        np.testing.assert_allclose(without.associations[name], share)
    for null, shares in Nulls.of(bare).shares(matrices).items():
        expected = Nulls.of(full).shares(matrices)[null]
        np.testing.assert_allclose(shares["residual"], 1 - sum(expected[family.name] for family in full.families))


def test_a_zero_matrix_has_no_shares() -> None:
    shares = mixed_ledger().shares(np.zeros((12, 12)))
    assert np.isnan(shares.residual) and all(np.isnan(part) for part in shares.associations.values())


def test_nulls_are_the_means_over_random_matrices() -> None:
    ledger, generator = mixed_ledger(), np.random.default_rng(6)
    matrix = generator.standard_normal((12, 3)) @ generator.standard_normal((3, 12)) + 0.2 * generator.standard_normal(
        (12, 12)
    )
    nulls = Nulls.of(ledger).shares(matrix)
    grams = {"rows": matrix @ matrix.T, "columns": matrix.T @ matrix}
    roots = {name: np.linalg.cholesky(gram) for name, gram in grams.items()}
    gaussian = generator.standard_normal((20_000, 12, 12))
    samples = {"rank": gaussian, "rows": roots["rows"] @ gaussian, "columns": gaussian @ roots["columns"].T}
    for null in NULLS:
        drawn = samples[null]
        energy, shares = (drawn**2).sum((1, 2)), ledger.shares(drawn)
        parts = shares.associations | shares.cells | {"residual": shares.residual}
        assert sum(float(value) for value in nulls[null].values()) == pytest.approx(1)
        for name, part in parts.items():
            # The null is a ratio of expectations: weigh each sample with its energy.
            weighed = part * energy / energy.mean()
            error = 5 * weighed.std() / np.sqrt(len(weighed))
            assert abs(weighed.mean() - float(nulls[null][name])) < error, (null, name)


def test_rank_null_of_a_full_span_is_its_dimensions() -> None:
    generator = np.random.default_rng(0)
    words = book("tok", generator.standard_normal((65, 128)))
    rank = Nulls.of(Ledger([words], [words])).shares(np.eye(128))["rank"]
    assert float(rank["tok x tok"]) == pytest.approx(65**2 / 128**2)  # 26 % of anything
    places = book("pos", generator.standard_normal((256, 128)))
    shares = Ledger([places], [places]).shares(generator.standard_normal((128, 128)))
    assert float(shares.cells["pos x pos"]) == pytest.approx(1)  # more positions than dimensions explain everything


def test_derangements_leave_no_pair_and_explain_what_random_pairs_do() -> None:
    generator = np.random.default_rng(7)
    orders = [tuple(derangement(4, generator)) for _ in range(2000)]
    assert all(i != target for order in orders for i, target in enumerate(order))
    counts = np.array([orders.count(order) for order in sorted(set(orders))])
    assert len(counts) == 9 and ((counts - 2000 / 9) ** 2 / (2000 / 9)).sum() < 26  # chi-square, 8 degrees, p = 0.001
    ledger = mixed_ledger()
    wrong = Derangements.of(ledger, ledger.families[2], 30, generator)
    drawn = wrong.shares(generator.standard_normal((400, 12, 12)))
    assert drawn.mean() == pytest.approx(4 / 144, rel=0.1)
    u, v = wrong.u, wrong.v[3]
    columns = np.array([np.outer(a, b).ravel() for a, b in zip(u, v, strict=True)]).T
    matrix = generator.standard_normal((12, 12))
    assert wrong.shares(matrix)[3] == pytest.approx(explained(columns, matrix) / (matrix**2).sum())
    with pytest.raises(BirthlensError, match="two entries"):
        derangement(1, generator)


def test_ledger_table_is_ready_for_a_stacked_chart() -> None:
    ledger, generator = mixed_ledger(), np.random.default_rng(8)
    initial, copied = generator.standard_normal((12, 12)), ledger.inputs["tok"].vectors
    steps = [(10 * i, initial + i * copied.T @ copied) for i in range(25)]
    table = ledger_table(steps, ledger, "W", minus=initial, generator=np.random.default_rng(0))
    assert list(table.columns) == COLUMNS and set(table["kind"]) == {"association", "cell", "residual"}
    wide = table.pivot(index="step", columns="family", values="share")
    np.testing.assert_allclose(wide.loc[10:].sum(axis=1), 1)
    assert wide.loc[0].isna().all()  # nothing has moved yet
    copy = table[(table["family"] == "copy") & (table["step"] == 240)].iloc[0]
    assert (copy["alone"], copy["coefficient"], copy["n"]) == (pytest.approx(1), pytest.approx(24), 4)
    assert copy["null_derangement"] < copy["null_derangement_95"] < 0.9 and copy["share"] > 0.7
    again = ledger_table(steps, ledger, "W", minus=initial, generator=np.random.default_rng(0))
    assert again.equals(table)
    entries = entries_table(ledger, steps[3][1] - initial)
    assert entries.query("family == 'copy'")["coefficient"].tolist() == pytest.approx([3] * 4)
    assert entries.iloc[0][["input", "output"]].tolist() == ["pos1", "pos0"]
    with pytest.raises(BirthlensError, match="no checkpoint"):
        ledger_table([], ledger, "W")


def test_paper_ledgers_find_planted_memories_and_refuse_moving_codebooks() -> None:
    weights = initial_weights(ModelConfig(d_model=64), 10, 20, np.random.default_rng(9))
    ledgers, w_e = paper_ledgers(weights, triggers=[1, 4, 6]), weights["W_E"].astype(float)
    w_1 = ledgers["trigger_memory"][1].outputs["W_E>L0H0.OV"].vectors.astype(float)
    planted = {
        "L0.W_K": weights["W_pos"][:-1].T @ weights["W_pos"][1:],  # query p_t, key p_{t-1}; W_QK = W_K^T
        "L1.W_K": w_1[[1, 4, 6]].T @ w_e[[1, 4, 6]],
        "L1.W_O": np.linalg.inv(weights["L1.W_V"][0].astype(float)) @ w_e.T @ weights["W_U"].T,
    }
    moved = weights.replaced({name: weights[name] + value[None] for name, value in planted.items()})
    table = paper_ledger_table([(0, weights), (100, moved)], triggers=[1, 4, 6])
    last = table[(table["step"] == 100) & ~table["reading"].eq("L1.W_O")].set_index(["matrix", "family"])["share"]
    found = [("prev_token_memory", "previous position"), ("trigger_memory", "triggers"), ("output_memory", "copy")]
    assert last.loc[found].tolist() == pytest.approx([1, 1, 1], abs=0.05)
    trained = weights.replaced({"W_E": weights["W_E"] + 0.1})
    with pytest.raises(BirthlensError, match="W_E moves between checkpoints"):
        paper_ledger_table([(0, weights), (1, trained)])


@pytest.mark.parametrize("minus_initial", [True, False])
def test_what_is_booked_is_the_change_or_the_whole(minus_initial: bool) -> None:
    weights = initial_weights(ModelConfig(d_model=32), 10, 20, np.random.default_rng(2))
    generator = np.random.default_rng(3)
    noise = {n: generator.standard_normal(weights[n].shape, dtype=np.float32) for n in ("L0.W_K", "L1.W_K", "L1.W_O")}
    moved = weights.replaced({name: weights[name] + 0.2 * value for name, value in noise.items()})
    both = paper_ledger_table([(0, weights), (5, moved)], None, minus_initial)
    assert list(dict.fromkeys(both["reading"])) == ["L0.W_K", "L1.W_K", "L1.W_O", "circuit"]
    table = both[both["reading"] != "L1.W_O"].set_index(["step", "matrix", "family"])
    for name, (circuit, ledger) in paper_ledgers(weights).items():
        matrix = paper_circuits(moved)[name].matrix - (circuit.matrix if minus_initial else 0)
        expected = ledger.shares(matrix)
        assert table.loc[(5, name, "residual"), "share"] == pytest.approx(float(expected.residual), abs=1e-6)
        for family, share in expected.associations.items():
            assert table.loc[(5, name, family), "share"] == pytest.approx(float(share), abs=1e-6)
        assert np.isnan(loc(table)[(0, name, "residual"), "share"]) == minus_initial  # nothing has moved


def test_the_feed_forward_is_booked_on_the_successors_of_each_token() -> None:
    weights = initial_weights(ModelConfig(d_model=64, feed_forward="linear"), 10, 20, np.random.default_rng(5))
    bigram = np.random.default_rng(6).dirichlet(np.full(10, 0.5), size=10)
    bigram[3] = np.eye(10)[2]
    w_e, w_u = weights["W_E"].astype(float), weights["W_U"].astype(float)
    planted = np.zeros((64, 64))
    for i in range(10):
        logs = np.array([np.log(p) if p > np.exp(-10) / 10 else -10 - np.log(10) for p in bigram[i]])
        planted += (i + 1) * np.outer(w_e[i], sum((logs[j] - logs.mean()) * w_u[:, j] for j in range(10)))
    moved = weights.replaced({"L1.W_F": (weights["L1.W_F"] + planted).astype(np.float32)})
    table = paper_ledger_table(
        [(0, weights), (9, moved)], bigram=bigram, generator=np.random.default_rng(0), cells=False
    )
    row = table[(table["step"] == 9) & (table["family"] == "successors")].iloc[0]
    assert (row["matrix"], row["n"], row["alone"]) == ("feed_forward_memory", 10, pytest.approx(1, abs=1e-3))
    assert row["coefficient"] == pytest.approx(5.5, rel=1e-3) and row["null_derangement"] < 0.7
    assert table.attrs["left_out"] == []
    without = paper_ledger_table([(0, weights), (9, moved)])
    assert set(without["matrix"]) == {"prev_token_memory", "trigger_memory", "output_memory"}
    assert without.attrs["left_out"] == ["feed_forward_memory"]


@pytest.mark.parametrize("minus_initial", [True, False])
def test_the_trained_matrix_is_held_to_plain_least_squares(minus_initial: bool) -> None:
    """One column a token, the vectorised outer product of w_E(k) W_V and w_U(k), against the change of W_O."""
    weights = initial_weights(ModelConfig(d_model=24), 10, 12, np.random.default_rng(2))
    w_e, w_v, w_u = (weights[name].astype(float) for name in ("W_E", "L1.W_V", "W_U"))
    memory = (w_e @ w_v[0]).T @ w_u.T
    written = 0.3 * memory + 0.1 * np.random.default_rng(3).standard_normal((24, 24))
    moved = weights.replaced({"L1.W_O": (weights["L1.W_O"] + written).astype(np.float32)})
    table = paper_ledger_table([(0, weights), (5, moved)], None, minus_initial)
    row = table[(table["step"] == 5) & (table["reading"] == "L1.W_O") & (table["family"] == "copy")].iloc[0]
    target = moved["L1.W_O"][0].astype(float) - (weights["L1.W_O"][0] if minus_initial else 0)
    columns = np.array([np.outer(w_e[k] @ w_v[0], w_u[:, k]).ravel() for k in range(10)]).T
    assert row["alone"] == pytest.approx(explained(columns, target) / (target**2).sum(), rel=1e-5)
    other = table[(table["step"] == 5) & (table["reading"] == "circuit") & (table["family"] == "copy")].iloc[0]
    product = w_v[0] @ (moved["L1.W_O"][0].astype(float) - (weights["L1.W_O"][0] if minus_initial else 0))
    columns = np.array([np.outer(w_e[k], w_u[:, k]).ravel() for k in range(10)]).T
    assert other["alone"] == pytest.approx(explained(columns, product) / (product**2).sum(), rel=1e-5)
    assert other["alone"] != pytest.approx(row["alone"], rel=1e-2)


@pytest.mark.parametrize(("kind", "factor"), [("QK", "left"), ("QK", "right"), ("OV", "left"), ("OV", "right")])
def test_each_matrix_of_any_head_stands_between_its_own_codebooks(kind: str, factor: Factor) -> None:
    config = ModelConfig(family="full", d_model=16, n_heads=2)
    weights = initial_weights(config, 6, 8, np.random.default_rng(4))
    head = Head(1, 1)
    circuit = qk_circuit(weights, head) if kind == "QK" else ov_circuit(weights, head)
    w_e, w_u = weights["W_E"].astype(float), weights["W_U"].astype(float).T
    right = w_e if kind == "QK" else w_u
    first, second = ("W_Q", "W_K") if kind == "QK" else ("W_V", "W_O")
    a, b = weights.of_head(head, first).astype(float), weights.of_head(head, second).astype(float)
    b = b.T if kind == "QK" else b
    product = Ledger([book("in", w_e)], [book("out", right)], [Family("own", "in", "out", Association.identity(6))])
    own = factor_ledger(product, circuit, factor)
    matrix, u, v = (a, w_e, right @ b.T) if factor == "left" else (b, w_e @ a, right)
    columns = np.array([np.outer(u[k], v[k]).ravel() for k in range(6)]).T
    share = own.shares(matrix).alone["own"]
    assert float(share) == pytest.approx(explained(columns, matrix) / (matrix**2).sum(), rel=1e-5)
    assert own.cell_names == [f"in x out·{second}" if factor == "left" else f"in·{first} x out"]
    with pytest.raises(BirthlensError, match="single matrix"):
        factor_ledger(product, Circuit("W_F", matrix), factor)


def test_where_both_matrices_are_trained_the_circuit_stands_alone() -> None:
    weights = initial_weights(ModelConfig(d_model=16), 6, 8, np.random.default_rng(2))
    moved = weights.replaced({name: weights[name] + 0.1 for name in ("L1.W_V", "L1.W_O")})
    table = paper_ledger_table([(0, weights), (5, moved)])
    assert set(table[table["matrix"] == "output_memory"]["reading"]) == {"circuit"}
    assert table.attrs["moving_partners"] == ["output_memory"]


def test_bad_ledgers_are_named() -> None:
    words, places, _ = books()
    target = Association.identity(4)
    with pytest.raises(BirthlensError, match="needs codebook 'pos' on that side; it has tok"):
        Ledger([words], [words], [Family("copy", "tok", "pos", target)])
    with pytest.raises(BirthlensError, match="same name"):
        Ledger([words], [words], [Family("copy", "tok", "tok", target)] * 2)
    with pytest.raises(BirthlensError, match="tok has 12, wide has 13"):
        Ledger([words, book("wide", np.ones((2, 13)))], [words])
    with pytest.raises(BirthlensError, match="different names"):
        Ledger([words, words], [places])
    with pytest.raises(BirthlensError, match=r"shape \(3, 3\)"):
        Ledger([words], [words]).shares(np.eye(3))
    with pytest.raises(BirthlensError, match="at most 8"):
        Ledger([words], [words], [Family(str(i), "tok", "tok", target) for i in range(9)])
