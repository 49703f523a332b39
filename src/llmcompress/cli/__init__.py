"""The command line: `llmcompress VERB`, or `python -m llmcompress VERB`; each family of verbs is a file.

Starting it imports no torch: a verb imports what it needs when it runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from ..errors import ClaimError, CompressionError, GateError, VerificationError
from .compress import compress
from .demo import demo
from .fit import fit
from .lists import list_strategies, list_tasks
from .measure import compare, evaluate
from .plan import plan
from .show import show
from .support import support
from .sweep import sweep
from .wording import Verb

_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="llmcompress",
    help="Compress Hugging Face models, and prove what it cost and gained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(f"llmcompress {__version__}")


app.command(cls=Verb)(compress)
app.command(cls=Verb)(plan)
app.command(cls=Verb)(evaluate)
app.command(cls=Verb)(compare)
app.command(cls=Verb)(sweep)
app.command(cls=Verb)(fit)
app.command(cls=Verb)(show)
app.command("list", cls=Verb)(list_strategies)
app.command("tasks", cls=Verb)(list_tasks)
app.command(cls=Verb)(support)
app.command(cls=Verb)(demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0, 1 for a failed claim or gate, 2 for bad input, 130 for Ctrl-C."""
    from rich.console import Console
    from rich.markup import escape

    problems = Console(stderr=True)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: typer.echo(f"note: {message}", err=True)
        try:
            status = typer.main.get_command(app).main(args=argv, prog_name="llmcompress", standalone_mode=False)
        except (ClaimError, GateError, VerificationError) as error:
            problems.print(f"[bold red]failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            return _FAILED
        except CompressionError as error:
            problems.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            return _BAD_INPUT
        except OSError as error:  # of a file that was asked for, and that nothing has told of in better words
            problems.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            return _BAD_INPUT
        except (KeyboardInterrupt, typer.Abort):
            status = _INTERRUPTED
        except Exception as error:
            # Usage errors: newer releases of typer have a click of their own, older ones raise click's.
            if not hasattr(error, "show"):
                raise
            error.show()
            return int(getattr(error, "exit_code", _BAD_INPUT))
    if status == _INTERRUPTED:  # which newer releases of typer return
        problems.print("\n[yellow]interrupted; nothing half-written[/]", highlight=False)
    return status if isinstance(status, int) else 0
