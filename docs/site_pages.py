"""What the documentation site needs beyond its pages: the API reference, and links into the repository.

The reference has one page a package and one entry a module. Links that leave `docs/` lead to files of the repository: they are
checked, and shown as paths, since the site holds no copies of those files.
"""

from __future__ import annotations

import re
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


def on_files(files: Any, config: Any) -> Any:
    """Add the reference to the files of the site."""
    from mkdocs.structure.files import File

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
