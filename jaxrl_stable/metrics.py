"""Where the figures of a run go: metrics.jsonl, samples.jsonl, TensorBoard and the console.

The two JSON Lines files are the record; everything else can be made again from them
(`jaxrl_stable.report`). One object a line, ASCII only. Values that are not finite are written as
`null`, since JSON has no word for them; TensorBoard keeps the NaN or infinity.

A resumed run repeats the steps after its checkpoint. So that each step is recorded once, the writer
first drops what lies beyond the step it is told to start from.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.progress
import rich.text
import tensorboardX

from jaxrl_stable import distributed

# Console columns: (label, format, keys in order of preference); short, to fit 80 characters. KL is
# the mismatch between sampler and trainer. k3 and k1 both estimate it; k3 is shown where there is
# one, as it is never negative and less noisy.
COLUMNS = (
    ("reward", "{:.3f}", ("reward/mean",)),
    ("KL", "{:.1e}", ("mismatch/kl_k3_token_mean", "mismatch/kl_k1_token_mean")),
    ("entropy", "{:.3f}", ("entropy",)),
    ("tok/s", "{:,.0f}", ("throughput/tokens_per_s",)),
)
PLAIN_LINES = 20  # lines a run prints where there is no terminal to draw a bar on
SHOWN_CHARACTERS = 1_000


class MetricsWriter:
    """Writes scalars and samples of one run below `workdir`. Use as a context manager.

    One writer a run: where there are several processes, `open_writer` makes it in process 0 only.

    Args:
      workdir: directory of the run, made if missing.
      start_step: the step of the checkpoint the run continues from. Rows of later steps are
        dropped, rows up to and including it stay. 0 keeps a row of step 0 (an evaluation before
        training); -1 drops everything.
      total_steps: length of the run, for the bar.
      console: whether to show progress. Without a terminal, plain lines take the place of the bar.

    Raises:
      ValueError: when an existing file is damaged anywhere but in a torn last line.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        start_step: int = 0,
        total_steps: int | None = None,
        console: bool = True,
    ):
        self._workdir = pathlib.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        files = [self._workdir / name for name in ("metrics.jsonl", "samples.jsonl")]
        for path in files:
            _drop_after(path, start_step)
        self._metrics, self._samples = files
        for path in files:
            path.touch()
        self._tensorboard = tensorboardX.SummaryWriter(
            str(self._workdir / "tensorboard"),
            purge_step=start_step + 1,  # hides events of this step and later
            flush_secs=30,
            # Event files are named by the second; a quick restart must not overwrite one.
            filename_suffix=f".{time.time_ns()}",
        )
        self._start_step, self._total_steps = start_step, total_steps
        self._console = rich.console.Console(highlight=False) if console else None
        self._bar: rich.progress.Progress | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._tensorboard.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one row of scalars; safe on disk against a kill of the process when it returns.

        A step may be written more than once (training, then evaluation): readers merge the rows.
        """
        row = {name: _scalar(name, value) for name, value in scalars.items()}
        _append(self._metrics, {"step": int(step), "time": time.time(), **row})
        for name, value in row.items():
            self._tensorboard.add_scalar(name, value, int(step))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends sampled responses.

        A row has prompt, response, answer, score, status, advantage, and optionally, one entry per
        response token: tokens (strings), log_weight (nats), clipped (bool), differs (number of MoE
        layers whose experts differ between sampler and trainer).
        """
        for row in rows:
            _append(self._samples, {"step": int(step), **row})

    def progress(self, step: int, scalars: Mapping[str, float]) -> None:
        """Moves the bar, or prints a plain line now and then where there is no terminal."""
        if self._console is None:
            return
        shown = {label: _first(scalars, keys, form) for label, form, keys in COLUMNS}
        if self._console.is_terminal:
            if self._bar is None:
                self._bar = _progress_bar(self._console)
                self._bar.add_task("train", total=self._total_steps, **shown)
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=step, **shown)
            return
        every = max(1, self._total_steps // PLAIN_LINES) if self._total_steps else 10
        if step % every == 0 or step in (self._start_step + 1, self._total_steps):
            total = f"/{self._total_steps}" if self._total_steps else ""
            figures = "  ".join(f"{label} {value}" for label, value in shown.items())
            print(f"step {step}{total}  {figures}", flush=True)

    def show_sample(self, prompt: str, response: str, score: float) -> None:
        """Prints one sample above the bar. What the model wrote is shown as plain text only."""
        if self._console is None:
            return
        # A Text is never parsed for markup, and `visible` disarms escape sequences of the terminal.
        text = rich.text.Text.assemble(
            (f"score {score:g}", "bold green" if score > 0 else "bold red"),
            "  ",
            (_shorten(visible(prompt)), "dim"),
            "\n  → ",
            _shorten(visible(response)),
        )
        self._console.print(text, soft_wrap=True)


class NoWriter:
    """What the other processes of a run write: nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def _nothing(self, *_) -> None:
        pass

    write = samples = progress = show_sample = _nothing


def open_writer(workdir: str | os.PathLike, **settings: Any) -> MetricsWriter | NoWriter:
    """The writer of a run in process 0; see `MetricsWriter` for the arguments."""
    return MetricsWriter(workdir, **settings) if distributed.is_main() else NoWriter()


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """Rows of a JSON Lines file. A last line cut short by a kill is left out.

    Raises:
      ValueError: naming file and line, when any other line is not a JSON object.
    """
    lines = pathlib.Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline behind it: torn
                break
            raise ValueError(
                f"{path}, line {number}: not JSON ({error}); mend or delete the line"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object; mend or delete the line")
        rows.append(row)
    return rows


def write_atomic(path: pathlib.Path, text: str) -> None:
    """Writes a text file so that a reader, or a crash, sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def visible(text: str) -> str:
    """Text with characters that act instead of show (ESC, NUL, direction marks…) made visible.

    Newlines and tabs stay. C0 controls become their pictures (ESC → ␛), the rest \\u escapes.
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
    # line breaks. The zero-width joiner stays: emoji and several scripts are written with it.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and code != 0x200D:
        return f"\\u{code:04x}"
    return character


def _append(path: pathlib.Path, row: Mapping[str, Any]) -> None:
    # One write a row, so that a kill can tear the last line only; closed, as a bucket that is
    # mounted as a directory has a file from then on.
    with path.open("a", encoding="ascii") as file:
        file.write(json.dumps(_plain(row), allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Arrays as lists, and non-finite numbers as None, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _scalar(name: str, value: Any) -> float:
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(
            f"metric {name!r} has shape {array.shape}; reduce it to a scalar before writing"
        )
    return float(array.reshape(()))


def _drop_after(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int):
            raise ValueError(
                f"{path}, row {number}: no integer 'step'; mend it or use another directory"
            )
    # Always rewritten: this also removes a torn last line, onto which new rows would be glued.
    kept = [row for row in rows if row["step"] <= step]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))


def _progress_bar(console: rich.console.Console) -> rich.progress.Progress:
    figures = [
        rich.progress.TextColumn(f"[dim]{label}[/] {{task.fields[{label}]}}")
        for label, _, _ in COLUMNS
    ]
    return rich.progress.Progress(
        rich.progress.BarColumn(bar_width=12),
        rich.progress.MofNCompleteColumn(),
        *figures,
        rich.progress.TimeRemainingColumn(),
        console=console,
        redirect_stdout=sys.stdout.isatty(),
    )


def _first(scalars: Mapping[str, float], keys: Sequence[str], form: str) -> str:
    key = next((key for key in keys if key in scalars), None)
    return "–" if key is None else form.format(_scalar(key, scalars[key]))


def _shorten(text: str) -> str:
    """Cuts the middle out: the task stands at the start and the answer at the end."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"


class Clock:
    """Seconds of each phase of one step; a phase that comes again adds up."""

    def __init__(self) -> None:
        self._start, self._phases = time.perf_counter(), {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        name, seconds = f"time/{phase}", time.perf_counter() - begin
        self._phases[name] = self._phases.get(name, 0.0) + seconds

    def values(self) -> dict[str, float]:
        return self._phases | {"time/step": time.perf_counter() - self._start}
