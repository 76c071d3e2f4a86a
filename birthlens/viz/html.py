"""The parts of pages: scripts and styles that ship with birthlens, circuitsvis's bundle, and safely escaped text.

A page loads nothing: it contains everything, and its content security policy forbids anything else.
"""

from __future__ import annotations

import json
from functools import cache
from html import escape as escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from birthlens.errors import BirthlensError
from birthlens.system import write_atomically

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def asset(name: str) -> str:
    """Read a script or style of birthlens."""
    return (files("birthlens.viz") / "_web" / name).read_text(encoding="utf-8")


@cache
def circuitsvis_bundle() -> str:
    """Read the self-contained JavaScript that circuitsvis ships, adapted for an inline script.

    circuitsvis's own rendering prefers a CDN, accesses the internet at each display, leaves its tag open and does not escape
    tokens. Only its bundle is used for these reasons.
    """
    import circuitsvis

    home = Path(circuitsvis.__path__[0])
    file = home / "dist" / "cdn" / "iife.js"
    if not file.exists():
        raise BirthlensError(
            f"{file} is missing: this circuitsvis has no local bundle; install circuitsvis 1.43 or newer."
        )
    text = file.read_text(encoding="utf-8").replace("</script", "<\\/script")
    return "\n".join(line for line in text.splitlines() if not line.startswith("//# sourceMappingURL"))


def script_json(data: Any) -> str:
    r"""Format data as JSON for use inside a script element: no text in it can end the element or open a comment.

    Raises:
        ValueError: for NaN or infinite numbers, which are not valid JSON.

    Example:
        >>> script_json(["</script>"])
        '["\\u003c/script\\u003e"]'
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page(title: str, body: str, styles: str = "", scripts: str = "") -> str:
    """Assemble a complete HTML document; `body` is HTML, `title` is text."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{styles}
</style>
</head>
<body>
{body}
{scripts}
</body>
</html>
"""


def write_page(path: str | Path, html: str) -> Path:
    """Write a page atomically; the name must end in .html and its directory must exist."""
    path = Path(path)
    if path.suffix != ".html":
        raise BirthlensError(f"out = {str(path)!r}: the name of a page must end in .html.")
    if not path.parent.is_dir():
        raise BirthlensError(f"out = {str(path)!r}: the directory {str(path.parent)!r} does not exist; make it first.")
    write_atomically(path, html.encode("utf-8"))
    return path
