"""A config with comments reads as the same config, and no setting is without its meaning."""

from itertools import pairwise

import pytest
import yaml

from birthlens.config.base import Section
from birthlens.config.comments import commented, meanings
from birthlens.config.presets import PRESETS, preset
from birthlens.config.run import RunConfig
from birthlens.config.task import KINDS


@pytest.mark.parametrize("name", PRESETS)
def test_a_commented_config_is_the_same_config(name: str) -> None:
    config = preset(name, ["training.clamps=[freeze L0.W_K until=5]"]) if name == "demo" else preset(name)
    text = commented(config)
    assert RunConfig.parse(yaml.safe_load(text)) == config
    assert all(len(line) < 125 for line in text.splitlines())


def test_every_setting_has_a_meaning() -> None:
    sections = [kind for kind in RunConfig.kinds.values() if isinstance(kind, type) and issubclass(kind, Section)]
    for section in {*sections, *KINDS.values()}:
        lacking = set(section.kinds) - meanings(section).keys()
        assert not lacking, (section.__name__, lacking)
    lines = [line.strip() for line in commented(RunConfig()).splitlines()]
    for before, line in pairwise(lines):
        if ": " in line and not line.startswith(("#", "-")):
            assert before.startswith("#"), line
