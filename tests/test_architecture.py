"""The plan of the package, read from syntax trees: imports go down, between packages and inside them.

docs/architecture.md draws the same plan for people. A new module needs a place here.
"""

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1] / "birthlens"
MODULES = sorted(ROOT.rglob("*.py"))
LONGEST = 310
"""Lines of a module; one concept fits."""
LONGER = {"training.simplified.kernels": 340}
"""Modules that may be longer: Numba's disk cache notices edits of one file only, so all that it compiles is in one."""

PLAN = {
    "": "errors shapes labels _version < devices reading system",
    "config": "base clamps own_class < clamp_text model task < run < comments differences presets schedule",
    "tasks": """
        batch corpus sampling_kernel < prompts roles sampling < parts positions task < baselines
        < ngrams tokenizing < bigram chains facts noise < backcopy markov < text
        < kinds < predictors.prefix predictors.trigger_posterior < predictors.bag_of_tokens < predictors.reference
        < predictors.scores counter_sampling""",
    "model": """
        attention directory hooked_parts series sites < components hooked_transformer weights
        < alignment forward initialisation lens
        < edited_forward hooked layout stacked_forward fingerprints < audit hooks incremental < effects < live""",
    "runs": """
        files lineage lock provenance seal < header metrics < state tables < run < evaluation writer < reuse < verify""",
    "analysis.memories": """
        duals gram intervals series < memory < layer_norms recall < circuits ledger margins top_associations
        < ideal ledger_factors ledger_nulls names paper_ledgers recall_tables score_tables
        < birth_order ledger_tables < order_tables projections""",
    "training": """
        simplified.folding < simplified.buffers simplified.torch_step < simplified.kernels < simplified.numba_step
        < clamping.matrices clamping.passes clamping.timeline < clamping.clamped engines footprint optimiser < stack
        < stacked_optimiser loop < drawing < ensemble loggers pools recording grid workers < forking many replay
        < data_attribution sweep""",
    "analysis.interventions": """
        bootstrap head_sets metrics spec truncation < scoring weight_patching < corruptions directory_patching
        replacements suite_results < edges < backends < runner < ablation attribution < patching suite < causal_tables
        edge_tables""",
    "analysis.behaviour": """
        attention births decomposition excess head_weights logit_split noisy_recall sinks
        < contrast head_onsets head_scores phase real_memories sweep_results trajectory < monitor""",
    "analysis.theory": """
        fact_capacity fact_stages gradients width < first_step outer_products
        < memory_capacity memory_scaling three_steps updates""",
    "claims": """
        claim tiers < __init__ grids identity scorecard statistics.associative statistics.copying statistics.theory
        statistics.timing < catalogue.associative catalogue.theory statistics.behaviours statistics.fact_theory
        statistics.facts statistics.markov statistics.noise statistics.orders
        < catalogue.fact_theory catalogue.memories statistics.sinks
        < catalogue.memory_line < catalogue < book < reproduction""",
    "bench": "baselines pages scaling timing < cases ensembles < whole_runs",
    "viz": """
        attention_frames figures.style html report.numbers report.command_of_run watch
        < figures.tick_labels < figures.areas figures.attribution figures.contrast figures.curves figures.heatmaps
        figures.dark figures.phase notebook report.charts
        < figures report.leads report.page < figures.gallery report.scorecard
        < report.compare report.gallery_page report.memories report.series < report.story < report""",
    "cli": """
        options streams < __init__ subjects tables training < basics benching forking many_runs probing
        < demo memory phases prompting seeing < ablating patching scoring weight_patching""",
    "top": "__init__ __main__",
}
"""Packages from the ground up, and the modules of each from the ground up: one behind a < may import those before it."""

ORDER = list(PLAN)
FLOORS = {
    (package, module): floor
    for package, plan in PLAN.items()
    for floor, modules in enumerate(plan.split("<"))
    for module in modules.split()
}


def place(name: str) -> tuple[str, str]:
    """Return the package of PLAN and the module inside it that a dotted name below birthlens stands for."""
    if name in ("", "__main__"):
        return "top", name or "__init__"
    for package in sorted(ORDER, key=len, reverse=True):
        if package and (name == package or name.startswith(f"{package}.")):
            return package, name[len(package) + 1 :] or "__init__"
    return "", name


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path) for path in MODULES}


def imported(tree: ast.Module, top_level_only: bool = False) -> Iterator[str]:
    """Yield every module that is imported, in full."""
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                assert node.module is not None
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("birthlens.") in NAMES else node.module


def is_namespace(package: str, module: str, path: Path) -> bool:
    """Say whether a module is the docstring of its folder and nothing more."""
    return path.name == "__init__.py" and not list(imported(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_down(path: Path) -> None:
    package, module = place(dotted(path))
    if is_namespace(package, module, path):
        return
    assert (package, module) in FLOORS, f"{path} has no place; give it one in PLAN and in docs/architecture.md."
    for name in imported(ast.parse(path.read_text())):
        if name.split(".")[0] != "birthlens":
            continue
        below = place(name.removeprefix("birthlens").removeprefix("."))
        if below[0] == package:
            assert FLOORS[below] < FLOORS[package, module], (
                f"{package}.{module} imports {below[1]}, which is not below it"
            )
        else:
            assert ORDER.index(below[0]) < ORDER.index(package), (
                f"{package or module} imports {name}, of a higher package"
            )


def test_every_module_of_the_plan_exists() -> None:
    planned = {".".join(filter(None, ("" if package == "top" else package, module))) for package, module in FLOORS}
    assert {name.removesuffix(".__init__").removesuffix("__init__") for name in planned} <= NAMES


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_keeps_the_rules(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    outside = {name.split(".")[0] for name in imported(tree)}
    assert not outside & {"pickle", "dill", "joblib"}, f"{path} imports a pickler"
    assert len(text.splitlines()) <= LONGER.get(dotted(path), LONGEST), f"{path} is too long for one concept"
    assert "utils" not in path.name
    assert ast.get_docstring(tree), f"{path} does not say what it is"


def bound(nodes: list[ast.AST]) -> set[str]:
    """Return the names that these nodes give a meaning to."""
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            names.add(node.name or "")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.Lambda):
            yield from outside_functions(child)


def used(nodes: list[ast.AST]) -> set[str]:
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_name_is_defined(path: Path) -> None:
    """Ruff and mypy cannot tell an undefined name from an axis in a shape; here strings do not count."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    given = {*vars(builtins), "__file__", "__name__"}
    assert used(nodes) <= given | bound(nodes), used(nodes) - given - bound(nodes)
    hints = [node.annotation for node in nodes if isinstance(node, ast.arg) and node.annotation]
    hints += [node.returns for node in nodes if isinstance(node, ast.FunctionDef) and node.returns]
    names = used([part for hint in hints for part in ast.walk(hint)])
    outer = bound(list(outside_functions(tree)))
    assert names <= given | outer, f"annotations use {names - given - outer}, which the module does not import"


def without_type_checking(tree: Any) -> Any:
    """Drop the blocks that only type checkers read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_there_is_one_door_to_transformer_lens(path: Path) -> None:
    names = set(imported(without_type_checking(ast.parse(path.read_text()))))
    for_version_4 = {"model.hooked_parts", "model.hooked_transformer"}
    if dotted(path) not in {"model.lens", *for_version_4}:
        assert "transformer_lens" not in {name.split(".")[0] for name in names}
        assert not {name.removeprefix("birthlens.") for name in names} & for_version_4


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_no_global_randomness_and_nothing_prints_but_the_cli(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.manual_seed", "np.random.seed", "random.seed", "torch.load"), (path, called)
            if place(dotted(path))[0] != "cli":
                assert called != "print", f"{path} prints"


@pytest.mark.parametrize("path", sorted((ROOT / "analysis" / "memories").glob("*.py")), ids=dotted)
def test_memories_import_neither_torch_nor_transformer_lens(path: Path) -> None:
    """Not even where a function is called: what a matrix remembers is read from arrays."""
    names = {name.split(".")[0] for name in imported(without_type_checking(ast.parse(path.read_text())))}
    assert not names & {"torch", "transformer_lens"}


WITHOUT_TORCH = ["model.weights", "model.sites", "model.initialisation", "runs.run", "runs.files", "tasks.corpus",
                 "config.run", *(f"analysis.memories.{name}" for name in ("recall_tables", "ledger_tables"))]  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_reads_weights_starts_without_torch_and_pandas(name: str) -> None:
    tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())
    names = {top.split(".")[0] for top in imported(tree, top_level_only=True)}
    assert not names & {"torch", "transformer_lens", "pandas"}
