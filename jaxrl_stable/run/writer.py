"""Writes metrics and samples of a run: metrics.jsonl, samples.jsonl, TensorBoard, the console.

The two JSON Lines files are the record; everything else can be rebuilt from them
(`jaxrl_stable.report`). Each line is one object, ASCII only. Non-finite values are written as
`null`, because JSON cannot express them; TensorBoard keeps the NaN or infinity. Weights & Biases
gets a copy of the metrics if a project is set (`wandb_log`).

A resumed run repeats the steps after its checkpoint. To record each step once, the writer first
drops all rows after the step that it starts from.

The other files of a working directory: `config.gin` and `summary.json` (`train.py`), `report.html`
and `plots/` (`report`), `checkpoints/`, `cold_start/`, and the tokenizer (`task.py`).
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
import rich.text
import tensorboardX
from jax.typing import ArrayLike

from jaxrl_stable import distributed
from jaxrl_stable.distributed.preemption import Stopped
from jaxrl_stable.files import read_jsonl, write_atomic
from jaxrl_stable.run.wandb_log import WandbLog
from jaxrl_stable.text import visible

Columns = Sequence[tuple[str, str, tuple[str, ...]]]  # label, format, keys by preference

# Console columns of a training run; short, to fit 80 characters. KL is the mismatch between sampler
# and trainer. k3 and k1 both estimate it; k3 is preferred: it is never negative and less noisy.
COLUMNS: Columns = (
    ("reward", "{:.3f}", ("reward/mean",)),
    ("KL", "{:.1e}", ("mismatch/kl_k3_token_mean", "mismatch/kl_k1_token_mean")),
    ("entropy", "{:.3f}", ("entropy",)),
    ("tok/s", "{:,.0f}", ("throughput/tokens_per_s",)),
)
PLAIN_LINES = 20  # number of lines that a run prints without a terminal
SHOWN_CHARACTERS = 1_000


class MetricsWriter:
    """Writes scalars and samples of one run to `workdir`. Use as a context manager.

    A run has one writer: with several processes, `open_writer` creates it in process 0 only.

    Args:
      workdir: directory of the run, created if missing.
      start_step: step of the checkpoint that the run continues from. Rows of later steps are
        dropped; rows up to and including it stay. 0 keeps a row of step 0 (an evaluation before
        training); -1 drops everything.
      total_steps: length of the run, for the progress bar.
      console: whether to show progress. Without a terminal, plain lines replace the bar.
      columns: what the console shows.
      wandb_project: Weights & Biases project that gets a copy of the scalars; "" = off.
      config: the experiment, for Weights & Biases.

    Raises:
      ValueError: if an existing file is damaged anywhere except in a torn last line, or if wandb is
        needed but not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        start_step: int = 0,
        total_steps: int | None = None,
        console: bool = True,
        columns: Columns = COLUMNS,
        wandb_project: str = "",
        config: Any = None,
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
        self._columns = columns
        self._console = rich.console.Console(highlight=False) if console else None
        self._bar: rich.progress.Progress | None = None
        self._wandb = WandbLog(self._workdir, wandb_project, config) if wandb_project else None

    def __enter__(self):
        return self

    def __exit__(self, kind: type[BaseException] | None, *_):
        self.close(failed=kind is not None and not issubclass(kind, Stopped))

    def close(self, failed: bool = False) -> None:
        """Closes all outputs; if `failed`, Weights & Biases marks the run as failed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close(failed)

    def write(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Appends one row of scalars. The row survives a kill once this returns.

        A step may be written more than once (training, then evaluation); readers merge the rows.
        """
        row = {name: _scalar(name, value) for name, value in scalars.items()}
        _append(self._metrics, {"step": int(step), "time": time.time(), **row})
        for name, value in row.items():
            self._tensorboard.add_scalar(name, value, int(step))
        if self._wandb is not None:
            self._wandb.write(int(step), row)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends sampled responses.

        A row has prompt, response, answer, score, status and advantage. It may also have lists with
        one entry per response token: tokens (strings), log_weight (nats), clipped (bool), differs
        (number of MoE layers whose experts differ between sampler and trainer).
        """
        for row in rows:
            _append(self._samples, {"step": int(step), **row})

    def progress(self, step: int, scalars: Mapping[str, ArrayLike]) -> None:
        """Updates the bar; without a terminal, prints about 20 plain lines per run."""
        if self._console is None:
            return
        shown = {label: _first(scalars, keys, form) for label, form, keys in self._columns}
        if self._console.is_terminal:
            if self._bar is None:
                self._bar = _progress_bar(self._console, self._columns)
                self._bar.add_task("train", total=self._total_steps, **shown)
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=step, **shown)
            return
        every = max(1, self._total_steps // PLAIN_LINES) if self._total_steps else 10
        if step % every == 0 or step in (self._start_step + 1, self._total_steps):
            total = f"/{self._total_steps}" if self._total_steps else ""
            figures = "  ".join(f"{label} {value}" for label, value in shown.items())
            print(f"step {step}{total}  {figures}", flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._console is not None:
            self._console.print(rich.text.Text(visible(text)), soft_wrap=True)

    def show_sample(self, prompt: str, response: str, score: float) -> None:
        """Prints one sample above the bar, as plain text."""
        if self._console is None:
            return
        # A Text is never parsed for markup, and `visible` disarms terminal escape sequences.
        text = rich.text.Text.assemble(
            (f"score {score:g}", "bold green" if score > 0 else "bold red"),
            "  ",
            (_shorten(visible(prompt)), "dim"),
            "\n  → ",
            _shorten(visible(response)),
        )
        self._console.print(text, soft_wrap=True)


class NoWriter:
    """Writer for all processes of a run except process 0; does nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def _nothing(self, *_) -> None:
        pass

    write = samples = progress = say = show_sample = _nothing


def open_writer(workdir: str | os.PathLike, **settings: Any) -> MetricsWriter | NoWriter:
    """Returns the writer of this process; see `MetricsWriter` for the arguments."""
    return MetricsWriter(workdir, **settings) if distributed.is_main() else NoWriter()


def _append(path: pathlib.Path, row: Mapping[str, Any]) -> None:
    # One write per row, so that a kill can tear only the last line. The file is closed each time,
    # because a mounted bucket stores a file only when it is closed.
    with path.open("a", encoding="ascii") as file:
        file.write(json.dumps(_plain(row), allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Replaces arrays by lists and non-finite numbers by None, at any depth."""
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
                f"{path}, row {number}: no integer 'step'; fix it or use another directory"
            )
    # Always rewritten, to remove a torn last line: the next row would be appended to it.
    kept = [row for row in rows if row["step"] <= step]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))


def _progress_bar(console: rich.console.Console, columns: Columns) -> rich.progress.Progress:
    figures = [
        rich.progress.TextColumn(f"[dim]{label}[/] {{task.fields[{label}]}}")
        for label, _, _ in columns
    ]
    return rich.progress.Progress(
        rich.progress.BarColumn(bar_width=12),
        rich.progress.MofNCompleteColumn(),
        *figures,
        rich.progress.TimeRemainingColumn(),
        console=console,
        redirect_stdout=sys.stdout.isatty(),
    )


def _first(scalars: Mapping[str, ArrayLike], keys: Sequence[str], form: str) -> str:
    key = next((key for key in keys if key in scalars), None)
    return "–" if key is None else form.format(_scalar(key, scalars[key]))


def _shorten(text: str) -> str:
    """Cuts out the middle of a text: the task is at the start, and the answer at the end."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"


class Clock:
    """Measures the seconds of each phase of one step; repeated phases add up."""

    def __init__(self) -> None:
        self._start, self._phases = time.perf_counter(), {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        with jax.profiler.TraceAnnotation(phase):
            yield
        name, seconds = f"time/{phase}", time.perf_counter() - begin
        self._phases[name] = self._phases.get(name, 0.0) + seconds

    def values(self) -> dict[str, float]:
        return self._phases | {"time/step": time.perf_counter() - self._start}
