"""Writes the report of a run: `python -m jaxrl_stable.report --workdir=DIR`."""

import argparse
import sys
from collections.abc import Sequence

from jaxrl_stable.report import write_report
from jaxrl_stable.text import OneLineParser, any_terminal


class _Parser(OneLineParser):
    label = "report"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = _Parser(
        prog="python -m jaxrl_stable.report",
        description="Writes report.html and plots/*.png to the directory of a run.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", metavar="DIR", required=True, help="directory of the run")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Writes the report and prints its path."""
    any_terminal()
    workdir = parse(arguments).workdir
    try:
        path = write_report(workdir)
    except (OSError, ValueError) as error:
        raise SystemExit(f"report: {error}") from None
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
