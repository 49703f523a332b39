"""The command line: `python -m llmcompress VERB`, or `llmcompress VERB`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .errors import CompressionError

_BAD_INPUT, _INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    options = vars(_parser().parse_args(argv))
    verb = options.pop("verb")
    from rich.console import Console

    problems = Console(stderr=True)
    try:
        verb(options)
    except CompressionError as error:
        problems.print(f"[bold red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        return _BAD_INPUT
    except KeyboardInterrupt:
        problems.print("\n[yellow]interrupted; nothing half-written[/]", highlight=False)
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmcompress", description="Compress Hugging Face models, and prove it.")
    parser.add_argument("--version", action="version", version=f"llmcompress {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_demo(verbs)
    return parser


def _add_demo(verbs: Any) -> None:
    demo = verbs.add_parser(
        "demo",
        help="fine-tune, compress, compare and save a small model; no network, under 8 minutes on 2 cores",
        description="Fine-tunes a teacher on docstrings of the installed packages, compresses it in three ways, "
        "compares them, writes an HTML report and the best model, and reads that back. With --model, --train and "
        "--test it does the same on a model and data of yours.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    demo.set_defaults(verb=_demo)
    demo.add_argument("--model", metavar="FOLDER", help="model folder or hub name; else the MiniLM encoder from PyPI")
    demo.add_argument("--train", metavar="DATA", help=".csv, .tsv, .jsonl file or hub data set, with labels")
    demo.add_argument("--test", metavar="DATA", help="the same, to measure on (of a hub data set the split 'test')")
    demo.add_argument("--out", metavar="DIR", help="where report and model go (default: demo-output)")
    demo.add_argument("--cache", metavar="DIR", help="where trained stages are kept (default: the user's cache folder)")
    demo.add_argument("--threads", type=_positive, metavar="N", help="threads of torch (default: torch's own choice)")
    demo.add_argument("--seed", type=int, metavar="N", help="seeds data and training (default: 0)")
    demo.add_argument("--train-examples", type=_positive, metavar="N", help="docstrings a package to train with")
    demo.add_argument("--test-examples", type=_positive, metavar="N", help="docstrings a package to measure on")
    demo.add_argument("--teacher-epochs", type=float, metavar="X", help="passes over the data to fine-tune the teacher")
    demo.add_argument("--epochs", type=float, metavar="X", help="passes over the data of each distillation")
    demo.add_argument("--max-length", type=int, metavar="N", help="tokens a text is cut to")


def _demo(options: dict[str, Any]) -> None:
    from .demo.job import run

    run(**options)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _plain(error: BaseException) -> str:
    from rich.markup import escape

    return escape(str(error))


if __name__ == "__main__":
    sys.exit(main())
