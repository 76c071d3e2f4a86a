"""The command line: it parses, calls and prints; everything else lives below.

Only the standard library and click are imported at the top of these modules, so that help and completion are instant.
"""

from __future__ import annotations

import sys

import click

from birthlens import __version__
from birthlens.cli.basics import corpus, steps
from birthlens.cli.benching import bench
from birthlens.cli.causal import ablate, edges, patch, scores
from birthlens.cli.demo import demo
from birthlens.cli.memory import memories, memory, order, transplant
from birthlens.cli.probing import probe
from birthlens.cli.reproducing import reproduce, sweep
from birthlens.cli.seeing import attention, plot, report, watch
from birthlens.cli.training import train
from birthlens.errors import BirthlensError


@click.group(
    epilog="Start with: birthlens demo",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="birthlens")
def group() -> None:
    """Watch an induction head being born: train, probe, ablate, patch, read the memories, see it."""


for command in (
    corpus,
    train,
    steps,
    probe,
    demo,
    bench,
    ablate,
    patch,
    edges,
    scores,
    plot,
    report,
    attention,
    watch,
    memories,
    memory,
    transplant,
    order,
    reproduce,
    sweep,
):
    group.add_command(command)


def main() -> None:
    """Run the command line; what the caller can mend (input, files, memory) becomes one sentence and exit status 2."""
    try:
        group(standalone_mode=False)
    except BirthlensError as error:
        _stop(str(error), 2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _stop("interrupted; train goes on with --resume, ablate --out when it is run again.", 130)
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away; that is its right.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        _stop(f"{error.filename or 'a file'} cannot be used: {error.strerror or error}.", 2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        _stop("out of memory; lower training.batch_size, task.context, corpus.vocabulary or model.d_model.", 2)


def _stop(message: str, status: int) -> None:
    click.echo(f"birthlens: {message}", err=True)
    sys.exit(status)
