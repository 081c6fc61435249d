"""Text for people: byte counts, durations, tables, safe text, and command-line errors."""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections.abc import Sequence
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports errors on one line, without the usage text.

    Attributes:
      label: first word of that line.
    """

    label = "error"

    def error(self, message: str) -> NoReturn:
        """Prints the error and exits with status 2."""
        self.exit(2, f"{self.label}: {message} ({self.prog} --help lists the arguments)\n")


def any_terminal() -> None:
    """Lets stdout and stderr print "?" for characters that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def byte_size(count: float) -> str:
    """Formats a number of bytes, for example "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def duration(seconds: float) -> str:
    """Formats seconds, for example "12.3 ms"."""
    if seconds >= 1:
        return f"{seconds:,.3g} s" if seconds < 100 else f"{seconds:,.0f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Formats cells in columns, the first column left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def visible(text: str) -> str:
    """Makes control characters (ESC, NUL, direction marks, …) visible and thus harmless.

    Newlines and tabs are kept. C0 controls become their pictures (ESC → ␛), others \\u escapes.
    """
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    # Cc: C1 controls; Cf: direction marks and zero-width characters; Cs: lone surrogates; Zl, Zp:
    # line breaks. The zero-width joiner is kept because emoji and several scripts need it.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and code != 0x200D:
        return f"\\u{code:04x}"
    return character
