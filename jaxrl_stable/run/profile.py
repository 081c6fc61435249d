"""Profiles of chosen steps, to be opened in TensorBoard or Perfetto."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
from absl import logging

from jaxrl_stable import distributed


class ProfileSteps(NamedTuple):
    """First and last step to profile, both included."""

    first: int
    last: int


def parse_profile_steps(text: str) -> ProfileSteps | None:
    """Parses "3:6" (steps 3 to 6) or "3"; an empty text is None.

    Raises:
      ValueError: if the text is neither, or if the steps are out of order.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    steps = match and ProfileSteps(int(match[1]), int(match[2] or match[1]))
    if not steps or not 1 <= steps.first <= steps.last:
        raise ValueError(f"--profile_steps is {text!r}; write FIRST:LAST, for example 3:6")
    return steps


class Profiler:
    """Traces the steps of a run that `--profile_steps` selects. Use as a context manager.

    Traces go to `tensorboard/plugins/profile/` in the working directory, as an XPlane for
    TensorBoard's profile plugin and as `perfetto_trace.json.gz` for https://ui.perfetto.dev. With
    several processes, each has its own directory, `tensorboard/process_N/`, and writes only the
    XPlane. If a trace cannot be written, a warning is logged and the run continues.
    """

    def __init__(self, workdir: str | os.PathLike, steps: ProfileSteps | None):
        self._directory, self._steps = pathlib.Path(workdir, "tensorboard"), steps
        if distributed.several():
            self._directory /= f"process_{jax.process_index()}"
        self._active = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Annotates step `number`, and traces it if it is one of the chosen steps."""
        chosen = self._steps is not None and self._steps.first <= number <= self._steps.last
        if chosen and not self._active:
            jax.profiler.start_trace(
                str(self._directory), create_perfetto_trace=not distributed.several()
            )
            self._active = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if chosen and number == self._steps.last:
            self._stop()

    def _stop(self) -> None:
        if not self._active:
            return
        self._active = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError, ValueError) as error:
            logging.warning("the profile in %s could not be written: %s", self._directory, error)
