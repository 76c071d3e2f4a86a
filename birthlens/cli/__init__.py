"""The command line: it parses arguments, calls the library and prints the results.

Only the standard library and click are imported at the top of these modules, so that help and completion are fast. Each
command imports only its own module.
"""

from __future__ import annotations

import atexit
import gc
import io
import sys
from importlib import import_module

import click

from birthlens._version import __version__
from birthlens.cli.streams import note, standard_streams, tell
from birthlens.errors import LONGEST, BirthlensError
from birthlens.labels import shortened

HOMES = {
    "corpus": "basics",
    "train": "training",
    "steps": "basics",
    "verify": "basics",
    "audit": "basics",
    "fork": "forking",
    "contrast": "forking",
    "data-attribution": "forking",
    "probe": "probing",
    "demo": "demo",
    "bench": "benching",
    "ablate": "ablating",
    "patch": "patching",
    "edges": "patching",
    "scores": "scoring",
    "logit-split": "prompting",
    "plot": "seeing",
    "gallery": "seeing",
    "report": "seeing",
    "attention": "seeing",
    "watch": "seeing",
    "memories": "memory",
    "associations": "memory",
    "weight-patch": "weight_patching",
    "order": "memory",
    "reproduce": "many_runs",
    "sweep": "many_runs",
    "phase": "phases",
}
"""The module that holds each command."""
RENAMED = {"memory": "associations", "transplant": "weight-patch"}
"""Old names of commands, which still work."""


class Commands(click.Group):
    """The commands of `HOMES`; each is imported when it is used."""

    def list_commands(self, ctx: click.Context | None) -> list[str]:
        """Name every command."""
        return sorted(HOMES)

    def get_command(self, ctx: click.Context | None, cmd_name: str) -> click.Command | None:
        """Import one command; return None if no command has this name."""
        if cmd_name in RENAMED:
            old = cmd_name
            cmd_name = RENAMED[old]
            if ctx is None or not ctx.resilient_parsing:
                note(f"{old} is now called {cmd_name}; the old name still works.")
        if cmd_name not in HOMES:
            if ctx is not None and not ctx.resilient_parsing:
                from birthlens.labels import suggestion

                ctx.fail(f"No such command {cmd_name!r}.{suggestion(cmd_name, HOMES)}")
            return None
        command: click.Command = getattr(import_module(f"birthlens.cli.{HOMES[cmd_name]}"), cmd_name.replace("-", "_"))
        return command


@click.command(
    cls=Commands,
    epilog="Start with: birthlens demo",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="birthlens")
def group() -> None:
    """Train small transformers and study how an induction head forms: probe, ablate, patch, read weights, plot."""


def main() -> None:
    """Run the command line; what the caller can mend (input, files, memory) becomes one sentence and exit status 2."""
    atexit.register(gc.freeze)  # or Python would search all that was ever imported for cycles, only to exit
    try:
        with standard_streams():
            _run()
    except BirthlensError as error:  # standard output itself
        _stop(str(error), 2)


def _run() -> None:
    from birthlens.system import out_of_memory

    try:
        group(standalone_mode=False)
    except BirthlensError as error:
        _stop(str(error), 2)
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        tell(shortened(said.getvalue().rstrip(), LONGEST), err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _stop("interrupted; train goes on with --resume, ablate --out when it is run again.", 130)
    except OSError as error:
        _stop(str(BirthlensError(f"{error.filename or 'a file'} cannot be used: {error.strerror or error}.")), 2)
    except (MemoryError, RuntimeError, ValueError) as error:
        if not out_of_memory(error):
            raise
        if "CUDA" in str(error) or "MPS" in str(error):
            _stop("out of memory on the GPU; use fewer or shorter sequences, or --device cpu.", 2)
        _stop("out of memory; lower training.batch_size, task.context, corpus.vocabulary or model.d_model.", 2)


def _stop(message: str, status: int) -> None:
    tell(f"birthlens: {message}", err=True)
    sys.exit(status)
