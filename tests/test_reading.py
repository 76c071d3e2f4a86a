"""The one reader of texts from outside: what it takes, what it refuses in one sentence, and that it never works long."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from birthlens.errors import BirthlensError
from birthlens.reading import DEEPEST, MOST, SMALL, parse_json, parse_yaml, read_mapping, read_text

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text("aé1:- #'\"", max_size=6)
)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc"), inner, max_size=4),
    max_leaves=20,
)


@given(documents)
def test_json_is_read_as_json_reads_it(document: Any) -> None:
    assert parse_json(json.dumps(document), "it") == document


@given(documents)
def test_yaml_is_read_as_pyyaml_reads_it(document: Any) -> None:
    text = yaml.safe_dump(document)
    assert parse_yaml(text, "it") == yaml.safe_load(text) == document


@pytest.mark.parametrize(
    "text", ["a: 1_000", "a: 0x1F", "a: 017", "a: yes", "a: .inf", "a: 1:30", "a: '1'", "a: ~", "1: 2", "a:", "", "# c"]
)
def test_scalars_are_spelled_as_in_yaml_1_1(text: Any) -> None:
    assert parse_yaml(text, "it") == yaml.safe_load(text)


def test_a_date_is_text() -> None:
    assert parse_yaml("a: 2024-01-01", "it") == {"a": "2024-01-01"}
    assert parse_yaml("a: 2001-99-99", "it") == {"a": "2001-99-99"}


REFUSED = {
    "aliases": (BOMB, "alias"),
    "lists in lists": ("[" * 100_000, "levels deep"),
    "mappings in mappings": ("{a: " * 5000, "levels deep"),
    "keys in keys": ("? " * 5000, "levels deep"),
    "one level too many": ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "levels deep"),
    "too many values": ("[" + "0," * (3 * MOST) + "]", "values"),
    "a long number": ("1" * 5000, "number"),
    "a number of 65 bits": (str(2**64), "64 bits"),
    "a broken number": ("-0b_", "cannot be read"),
    "a tag": ("!!python/object/apply:os.system [ls]", "tag"),
    "a binary": ("!!binary zzz", "tag"),
    "a key twice": ("{a: 1, a: 2}", "twice"),
    "a list as key": ("? [a]\n: 3", "keys must be text"),
    "two documents": ("--- a\n--- b", "several documents"),
    "a lone surrogate": ("\ud800", "surrogate"),
    "an escape": ("a: \x1b[2J", "control characters"),
    "no YAML": ("a: b: c", "is not YAML"),
}


@pytest.mark.parametrize(("text", "said"), REFUSED.values(), ids=REFUSED)
def test_yaml_that_is_refused(text: Any, said: Any) -> None:
    began = time.process_time()
    with pytest.raises(BirthlensError, match=said) as error:
        parse_yaml(text, "it")
    assert "\n" not in str(error.value) and str(error.value).startswith("it ") and len(str(error.value)) < 400
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "levels deep"),
        ('{"a":' * 100_000, "levels deep"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "levels deep"),
        ("1" * 5000, "digits"),
        (str(-(2**63) - 1), "64 bits"),
        ('{"a": 1, "a": 2}', "twice"),
        ('"\\ud800"', "surrogate"),
        ("", "is not JSON"),
        ("[" + "0," * MOST + "0]", "values"),
    ],
)
def test_json_that_is_refused(text: Any, said: Any) -> None:
    with pytest.raises(BirthlensError, match=said) as error:
        parse_json(text, "it")
    assert "\n" not in str(error.value)


def test_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_bytes(b"#" * (SMALL + 1))
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    (tmp_path / "list.yaml").write_text("[1]")
    for name, said in {
        "long.yaml": "longer than",
        "latin.yaml": "not UTF-8",
        "list.yaml": "must be a mapping",
        "absent.yaml": "No such file",
        ".": "directory",
        "a\0b": "null byte",
        "\udcff.yaml": "No such file",
    }.items():
        with pytest.raises(BirthlensError, match=said) as error:
            read_mapping(tmp_path / name, "config")
        str(error.value).encode()  # can be printed
    with pytest.raises(BirthlensError, match="longer than"):
        read_text("/dev/zero", "config")
