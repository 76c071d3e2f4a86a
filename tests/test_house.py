"""The plan of the house, held by syntax trees: imports go down, rooms stay small, one door to TransformerLens."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "birthlens"
MODULES = sorted(path for path in ROOT.rglob("*.py"))

# Which floor a room is on; a module may import from its own floor and from those below.
FLOORS = {
    "errors": 0, "disk": 0, "section": 0, "architecture": 0, "config": 0, "presets": 0, "sites": 0, "legible": 0,
    "provenance": 0, "machine": 0, "shapes": 0,
    "corpus": 1, "weights": 1, "initialisation": 1, "sampling": 1, "sampling_kernel": 1, "task": 1,
    "forward": 2, "model": 2, "prefix": 2, "oracles": 2, "bag_of_tokens": 2, "trigger_posterior": 2,
    "run_files": 3, "run_writer": 3, "runs": 3, "analysis": 3, "training": 4, "standing": 5, "sweep": 5, "claims": 5,
    "figures": 6, "notebook": 6, "report": 6, "watch": 6, "bench": 6, "attention_frames": 6, "evidence": 6, "web": 6,
    "scorecard_page": 6,
    "cli": 7, "__main__": 7, "__init__": 7,
}  # fmt: skip


def room(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imported(tree, top_level_only=False):
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def type_checking_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for inner in node.body:
                yield from imported(ast.Module([inner], []))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_keeps_the_rules(path):
    tree = ast.parse(path.read_text())
    assert room(path) in FLOORS, f"{path} stands in no known room; give it a floor in this test and in the README."
    floor = FLOORS[room(path)]
    only_types = set(type_checking_imports(tree))
    for name in imported(tree):
        if name.split(".")[0] == "birthlens" and name != "birthlens" and name not in only_types:
            other = name.split(".")[1]
            assert FLOORS.get(other, 0) <= floor, f"{path.name} (floor {floor}) imports {name} (floor {FLOORS[other]})"
        if name.split(".")[0] == "transformer_lens" and name not in only_types:
            assert path.name == "model.py", f"{path} imports transformer_lens; only model.py may."
        assert name not in ("pickle", "dill", "joblib"), f"{path} imports {name}; no pickles here."
    assert len(path.read_text().splitlines()) <= 320, f"{path} is too long for one concept."
    assert "utils" not in path.name
    assert ast.get_docstring(tree), f"{path} does not say what it is."


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_global_randomness_and_nothing_prints_but_the_cli(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.manual_seed", "np.random.seed", "random.seed", "torch.load"), (
                f"{path}: {called}"
            )
            if room(path) != "cli":
                assert called != "print", f"{path} prints"


WEIGHT_WING = ["weights", "runs", "run_files", "corpus", "config", "sites", "initialisation"]


@pytest.mark.parametrize("name", WEIGHT_WING)
def test_the_weight_wing_imports_no_torch(name):
    tops = set(imported(ast.parse((ROOT / f"{name}.py").read_text()), top_level_only=True))
    assert not {top for top in tops if top and top.split(".")[0] in ("torch", "transformer_lens", "pandas")}
