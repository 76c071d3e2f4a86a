"""Hostile input, drawn from a seed: documents that are nearly right, bytes that are no text, arguments of every command."""

import json
import math
import random
from typing import Any

import yaml

SCALARS = [None, True, False, -1, 0, 1, 2, 3, 10**12, 10**18, 2**63, 2**64, -(2**70), 10**40, 1e308, 1e-320, -0.0, 0.5,
           math.nan, math.inf, "", " ", "a", "=1+1", "\x1b[2J", "\u202eb", "\ud800", "\udcff", "\0", "a" * 5000, "[[", "*a",
           "&a", "!!python/name:os.system",
           "L0H0", "L9H9", "L" + "9" * 5000 + "H0", "1e-3", "1:30", "2001-99-99", "<<", "~", "NaN", "embed->L0H0.q", "none",
           "L1.W_O", "W_E", "task.context=8", "all", "-1", "١", "0x", "1_0"]  # fmt: skip
NAMES = ["", "a", "base", "task", "model", "seeds.init", "kind", "cases", "none", "\x1b", "1", "a" * 3000, "<<", "="]
CONFIG: dict[str, dict[str, Any]] = {
    "corpus": {"source": "markov", "path": "corpus.txt", "vocabulary": 12, "zipf_exponent": 1.0, "concentration": 0.3,
               "seed": 0},
    "task": {"context": 16, "n_triggers": 2, "triggers": "fixed", "offset": 0, "outputs": "uniform", "no_repeat": False,
             "cycles": "published", "split": "none", "split_fraction": 0.75, "show_latents": False},
    "model": {"family": "simplified", "d_model": 8, "n_layers": 2, "n_heads": 1, "d_mlp": None, "feed_forward": "none",
              "positions": "random", "scaled_scores": True, "init": "authors"},
    "optimiser": {"kind": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "betas": [0.9, 0.99]},
    "training": {"steps": 2, "batch_size": 4, "loss": "in_context", "trained": ["L0.W_K", "L1.W_O"],
                 "freeze_until": {"L0.W_K": 1}, "engine": "auto"},
    "checkpoints": {"schedule": "linear", "every": 1, "per_decade": 5, "steps": [1], "sensitivity": 0.0},
    "evaluation": {"batch_size": 4, "every": 2},
    "seeds": {"init": 0, "data": 0, "evaluation": 3},
}  # fmt: skip
SWEEP = {"preset": "demo", "overrides": ["training.steps=2", "model.d_model=8"], "cases": {"a": [], "b": ["task.offset=1"]},
         "axes": {"task.n_triggers": [1, 2], "model.d_model": [8, 16]}, "seeds": 2}  # fmt: skip
SUITE = {
    "name": "suite", "heads": "L0H0,L0H0+L1H0", "methods": ["zero", "mean"], "components": True, "seed": 0, "draws": 5,
    "metrics": ["in_context.accuracy"],
    "cases": {"cut": [{"edge": "L0H0->L1H0.k", "method": "mean", "positions": "all", "source": "reference"}],
              "z": [{"site": "z", "method": "zero", "layer": 1, "heads": [0], "positions": [0, 1]}]},
}  # fmt: skip
COUNTS = {"vocab": ["a", "b", "c"], "counts": [[0, 3, 1], [2, 0, 0], [0, 1, 5]], "unigram": [3, 2, 1]}
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c]\n"
DEEP = ["[" * 100_000, '{"a":' * 50_000, "{a: " * 5000, "- " * 5000, "? " * 5000, "[" * 40 + "]" * 40]
_ONE_WAY = 0.5


def document(rng: random.Random, template: object) -> tuple[bytes, str]:
    """Draw a document: a template with some of it replaced, and now and then with broken text; and its ending."""
    ending = rng.choice([".json", ".yaml"])
    tree = json.loads(json.dumps(template))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        tree = _changed(rng, tree)
    try:
        text = json.dumps(tree) if ending == ".json" else yaml.safe_dump(tree)
    except (ValueError, yaml.YAMLError, RecursionError):
        text = json.dumps(template)
    data = text.encode("utf-8", "surrogatepass")
    return broken(rng, data) if rng.random() < 0.25 else data, ending


def _changed(rng: random.Random, tree: object) -> object:
    """Change one place of a document."""
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree))
        return {**tree, key: _changed(rng, tree[key])}
    if isinstance(tree, list) and tree and rng.random() < 0.7:
        place = rng.randrange(len(tree))
        return [*tree[:place], _changed(rng, tree[place]), *tree[place + 1 :]]
    match rng.randrange(8):
        case 0:
            return [tree]
        case 1:
            return {rng.choice(NAMES): tree}
        case 2:
            return [] if rng.random() < _ONE_WAY else {}
        case 3 if isinstance(tree, dict):
            return {**tree, rng.choice(NAMES): rng.choice(SCALARS)}
        case 4 if isinstance(tree, list):
            return tree * rng.choice([0, 2, 50])
        case 5:
            for _ in range(rng.choice([5, 40, 200])):
                tree = [tree]
            return tree
    return rng.choice(SCALARS)


def broken(rng: random.Random, data: bytes) -> bytes:
    """Break a text somewhere."""
    place = rng.randrange(len(data) + 1)
    match rng.randrange(10):
        case 0:
            return data[:place]
        case 1:
            return (
                data[:place]
                + rng.choice([b"\0", b"\xff", b"\xed\xa0\x80", b"\x1b[2J", b"\t", b"\r", b"\xc2\x85"])
                + data[place:]
            )
        case 2:
            return BOMB.encode()
        case 3:
            return rng.choice(DEEP).encode()
        case 4:
            return data * rng.choice([2, 30])
        case 5:
            return b"\xef\xbb\xbf" + data
        case 6:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
        case 7:
            return data.replace(
                rng.choice([b":", b",", b'"', b"\n", b"1"]), rng.choice([b"", b"::", b"&a ", b"*a", b"9" * 5000])
            )
        case 8:
            return data[:place] + data[place + 3 :]
    return data[:place] + bytes([rng.randrange(32, 127)]) + data[place + 1 :]


def corpus(rng: random.Random) -> bytes:
    """Draw what somebody may give as a text."""
    match rng.randrange(6):
        case 0:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(300)))
        case 1:
            codes = [rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(500)]
            return "".join(map(chr, codes)).encode()
        case 2:
            return (rng.choice("ab\n\r\t\x1b\u200b") * rng.choice([0, 1, 2, 1000])).encode()
        case 3:
            return "".join(map(chr, range(1, rng.choice([3, 300, 20_000])))).encode()
    return broken(rng, b"to be or not to be, that is the question")


def counts(rng: random.Random) -> tuple[bytes, str]:
    """Draw a table of counts, and the ending of its file."""
    if rng.random() < _ONE_WAY:
        return document(rng, COUNTS)[0], ".json"
    cells: list[list[Any]] = [["", "a", "b"], ["a", 1, 2], ["b", 3, 0]]
    for _ in range(rng.choice([0, 1, 2])):
        row = rng.choice(cells)
        row[rng.randrange(len(row))] = rng.choice(SCALARS)
        if rng.random() < 0.3:
            row.append(rng.choice(SCALARS))
    try:
        text = "\n".join(",".join(map(str, row)) for row in cells)
    except ValueError:  # a number of too many digits
        text = ",a,b\na,1" + "0" * 5000
    data = text.encode("utf-8", "surrogatepass")
    return broken(rng, data) if rng.random() < 0.3 else data, ".csv"


STEPS = [
    "all",
    "last",
    "every:1",
    "every:0",
    "every:-1",
    "every:" + "9" * 5000,
    "0",
    "-1",
    "-9",
    "1,1",
    "",
    ",",
    "x",
    "0,2",
]
WORDS = ["", "a", "all", "none", "zero", "mean", "L0H0", "L9H9", "L0H0+L1H0", "L1H0.QK", "output_memory", "W_O^2", "L1.W_O",
         "z", "layer", "role", "head,role", "embed->L0H0.q", "in_context.accuracy", "logit", "\x1b[2J", "=1", "a" * 2000,
         "rank:1", "rank:-1", "rank:x", "initial", "ideal", "ledger", "0", "-1", "1", "9" * 21, "1e400",
         "nan"]  # fmt: skip
OPTIONS = {
    "probe": ["--steps", "--what", "--full", "--format", "--out"],
    "memories": ["--steps", "--ledger", "--cells", "--whole", "--fold", "--full", "--format", "--out"],
    "associations": ["--matrix", "--step", "--top", "--basis", "--fold", "--format"],
    "weight-patch": ["--matrices", "--from", "--to", "--by", "--align", "--metric", "--sequences", "--full", "--format"],
    "order": ["--width", "--sensitivity", "--format"],
    "ablate": ["--heads", "--methods", "--components", "--metrics", "--suite", "--steps", "--batch-size", "--format"],
    "patch": ["--corruption", "--sites", "--by", "--direction", "--metrics", "--draws", "--steps", "--batch-size"],
    "edges": ["--edges", "--corruption", "--attribution", "--integration-steps", "--births", "--metrics", "--draws",
              "--steps"],
    "scores": ["--kind", "--steps", "--batch-size", "--seed", "--format"],
    "steps": ["--format"],
    "data-attribution": ["--from", "--until", "--by", "--every", "--figure", "--format", "--out"],
    "contrast": ["--what", "--width", "--figure", "--format", "--out"],
    "watch": ["--once"],
    "plot": ["--kind", "--out", "--steps", "--option"],
    "attention": ["--out", "--steps", "--text", "--row", "--heads", "--length"],
    "report": ["--out", "--quick"],
}  # fmt: skip
FLAGS = {"--full", "--ledger", "--cells", "--whole", "--fold", "--align", "--sensitivity", "--components", "--attribution",
         "--births", "--once", "--quick"}  # fmt: skip
VALUES = {
    "--steps": STEPS, "--from": STEPS, "--to": STEPS, "--step": ["0", "-1", "2", "7", "x", "9" * 5000],
    "--format": ["table", "csv", "json", "spreadsheet", "x"], "--what": ["memories", "behaviour", "attention", "x"],
    "--kind": ["heads", "weights", "attention", "composition", "transfer", "in-context-learning", "birth", "recall",
               "curves",
               "heatmap", "sweep", "ledger", "ablation", "edges", "x"],
    "--batch-size": ["1", "2", "0", "-1", "x", "9" * 18], "--draws": ["0", "1", "5", "-1", "x"],
    "--sequences": ["1", "2", "0"],
    "--seed": ["0", "-1", "9" * 30], "--row": ["0", "1", "9" * 9], "--length": ["1", "2", "64", "0"],
    "--top": ["1", "3", "0"],
    "--integration-steps": ["1", "2", "0"], "--width": ["0", "4", "-1", "nan", "inf", "1e308"],
    "--corruption": ["other_outputs", "first_replaced", "triggers_swapped", "shifted", "x"],
    "--direction": ["clean_into_corrupted", "corrupted_into_clean", "x"], "--basis": ["raw", "dual", "x"],
    "--until": ["0", "1", "2", "-1", "x", "9" * 30], "--every": ["1", "2", "0", "x"],
    "--by": ["role", "occurrence", "token", "target", "position", "sequence", "step", "layer", "x"],
    "--figure": ["a.svg", "absent/a.svg", "a.x", ""],
    "--option": ["x=step", "y=value", "metric=loss", "x", "=", "title=\x1b[2J", "value=value"],
    "--metric": ["in_context_accuracy", "global_loss", "x"], "--text": ["to be or not", "", "\ud800", "qqqq", "\x1b"],
}  # fmt: skip
OVERRIDES = [f"{section}.{key}" for section, keys in CONFIG.items() for key in keys]
NO_LONG_WORK = {"training.steps"}


def arguments(rng: random.Random, place: str, run: str) -> list[str]:
    """Draw the arguments of a command on a tiny run; files are written below `place`."""
    kind = rng.random()
    if kind < 0.25:
        return _training(rng, place)
    if kind < 0.35:
        return _others(rng, place, run)
    command = rng.choice(list(OPTIONS))
    found = [
        command,
        run
        if rng.random() < 0.9
        else rng.choice([place, f"{run}/run.json", "\udcff", "", "absent\x1b[2J", "/dev/null"]),
    ]
    if command == "contrast" or (command == "report" and rng.random() < _ONE_WAY):
        found.append(run)
    if command == "data-attribution":
        found.append(rng.choice(["output_memory", "trigger_memory", "L0H0.OV", "L1.W_F", *WORDS]))
    given = rng.sample(OPTIONS[command], k=rng.randrange(min(4, len(OPTIONS[command])) + 1))
    if command == "watch":
        given = ["--once"]
    for option in [*given, *({"plot": ["--kind", "--out"], "associations": ["--matrix"]}.get(command, []))]:
        found.append(option)
        if option == "--out":
            endings = rng.choice([".csv", ".json", ".parquet", ".svg", ".png", ".html", "", ".x", "/"])
            found.append(f"{place}/out{endings}" if rng.random() < 0.9 else "absent/out.csv")
        elif option not in FLAGS:
            found.append(rng.choice(VALUES.get(option, WORDS) if rng.random() < 0.8 else WORDS))
    return found


def _training(rng: random.Random, place: str) -> list[str]:
    tiny = [f"{section}.{key}={json.dumps(value)}" for section, keys in CONFIG.items() for key, value in keys.items()]
    changed = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(OVERRIDES)
        values = [value for value in SCALARS if not (name in NO_LONG_WORK and isinstance(value, int) and value > 3)]
        value = rng.choice(values)
        spelled = value if isinstance(value, str) and rng.random() < 0.7 else json.dumps(value)
        changed.append(f"{name}={spelled}".replace("\0", ""))
    flags = rng.choice([[], [], [], ["--show-config"], ["--preset", "demo", "--show-config"], ["--resume"]])
    return ["train", f"{place}/trained", *tiny, *changed, *flags]


def _others(rng: random.Random, place: str, run: str) -> list[str]:
    table = [{"step": 0, "metric": "loss", "value": 1.0}]
    kinds = [
        lambda: document(rng, SWEEP),
        lambda: document(rng, SUITE),
        lambda: (corpus(rng), ".txt"),
        lambda: counts(rng),
        lambda: document(rng, table),
    ]
    data, ending = rng.choice(kinds)()
    if rng.random() < 0.3:
        ending = rng.choice([".yaml", ".json", ".csv", ".txt", ".parquet", ""])
    file = f"{place}/input{ending}"
    with open(file, "wb") as out:
        out.write(data)
    return rng.choice([
        ["corpus", file], ["corpus", file, "--format", "json"], ["corpus", file, "--format", "csv"],
        ["plot", file, "--kind", rng.choice(VALUES["--kind"]), "--out", f"{place}/a.svg"],
        ["plot", file, "--kind", "curves", "--out", f"{place}/a.svg", "--option", rng.choice(VALUES["--option"])],
        ["ablate", run, "--suite", file], ["bench", "--from", file], ["bench", "--from", file, "--into", file],
        ["bench", "--only", rng.choice(WORDS)], ["reproduce", "--list", rng.choice(WORDS)], ["reproduce", "--tier", "x"],
        ["train", f"{place}/t", "--config", file, "--show-config"],
        ["train", f"{place}/t", "--corpus", file, "--show-config"],
        ["demo", file], [rng.choice(WORDS)], [], ["--help"], ["sweep", file, "--seeds", rng.choice(["0", "x", "9" * 18])],
    ])  # fmt: skip
