"""What the documentation site needs beyond its pages: the reference pages, and links into the repository.

The API reference has one page a package and one entry a module; the configuration and the command line have a page
each, made from the config classes and from the commands' own help. Links that leave `docs/` lead to files of the repository:
they are checked, and shown as paths, since the site holds no copies of those files.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[1]
PACKAGES = ("config", "tasks", "model", "runs", "training", "analysis/memories", "analysis/interventions",
            "analysis/behaviour", "analysis/theory", "claims", "bench", "viz")  # fmt: skip
OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)\)")


def reference_page(package: str) -> str:
    """Write the page of one package."""
    lines = [f"# birthlens.{package.replace('/', '.')}", ""]
    for file in sorted((ROOT / "birthlens" / package).rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        lines += [f"## {name.removeprefix('birthlens.')}", "", f"::: {name}", ""]
    return "\n".join(lines)


def configuration_page() -> str:
    """Write the page of all settings, from the config classes."""
    from birthlens.config import run
    from birthlens.config.task import KINDS

    sections = [run.RunConfig.kinds[name] for name in run.RunConfig.kinds if name != "task"]
    said = (
        "Settings are `section.key=value` on the command line, and nested mappings in a YAML or JSON file. "
        "`birthlens train x --show-config` prints those of a run."
    )
    lines = ["# Configuration", "", said, ""]
    for section in sections:
        lines += _section_lines(section, f"`{section.section}`")
    lines += ["## `task`", "", "`task.kind` chooses the task; each kind has its own keys. See [tasks](tasks.md).", ""]
    for name, section in KINDS.items():
        lines += _section_lines(section, f"`task.kind={name}`", "###")
    return "\n".join(lines)


def _section_lines(section: Any, title: str, level: str = "##") -> list[str]:
    from birthlens.config.comments import meanings

    said = meanings(section)
    rows = [
        f"| `{name}` | {_kind(kind)} | `{getattr(section, name)!r}` | {said.get(name, '')} |".replace("\n", " ")
        for name, kind in section.kinds.items()
    ]
    return [f"{level} {title}", "", inspect.cleandoc(section.__doc__ or ""), "", "| key | values | default | meaning |",
            "| --- | --- | --- | --- |", *rows, ""]  # fmt: skip


def _kind(kind: Any) -> str:
    """Write a type as its values: alternatives of a Literal, else the name of the type."""
    text = (
        re.sub(r"typing\.|Annotated\[|<class '(\w+)'>", r"\1", str(kind))
        if not isinstance(kind, type)
        else kind.__name__
    )
    text = re.sub(r", msgspec\.Meta\([^)]*\)\]?", "", text)
    choices = re.fullmatch(r"Literal\[(.*)\]", text)
    text = " or ".join(f"`{choice.strip()}`" for choice in choices[1].split(",")) if choices else f"`{text}`"
    return text.replace("|", "or")


def commands() -> Iterator[tuple[str, str]]:
    """Yield every command with its help."""
    import click

    from birthlens.cli import group

    context = click.Context(group, info_name="birthlens", max_content_width=100, terminal_width=100)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        own = click.Context(command, info_name=name, parent=context, max_content_width=100, terminal_width=100)
        yield name, command.get_help(own)


def command_page() -> str:
    """Write the page of the command line, from the commands' own help."""
    lines = ["# Command line", "", "Bad input is one sentence and exit status 2.", ""]
    for name, text in commands():
        lines += [f"## birthlens {name}", "", "```text", text, "```", ""]
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Add the reference to the files of the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "configuration.md", content=configuration_page()))
    files.append(File.generated(config, "command_line.md", content=command_page()))
    for package in PACKAGES:
        target = f"reference/{package.rpartition('/')[2]}.md"
        files.append(File.generated(config, target, content=reference_page(package)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Show links into the repository as paths; a path that leads nowhere fails the build."""
    from mkdocs.exceptions import PluginError

    def shown(match: re.Match[str]) -> str:
        target = (ROOT / "docs" / match[2]).resolve()
        if not target.exists():
            raise PluginError(f"{page.file.src_path} links to {match[2]}, which does not exist.")
        path = target.relative_to(ROOT)
        return match[1] if match[1].strip("`") == str(path) else f"{match[1]} (`{path}`)"

    return OUTSIDE.sub(shown, markdown)


class Examples(griffe.Extension):
    """Read a docstring's "Example:" as code, as "Examples:" is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section before it is parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
