"""Profiles of chosen steps, to be opened in TensorBoard or Perfetto."""

from __future__ import annotations

import os
import pathlib
import re
from typing import NamedTuple

import jax


class ProfileSteps(NamedTuple):
    """Steps to profile, both included."""

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
    """Traces the steps of a run that `--profile_steps` names. Use as a context manager.

    The trace goes to `tensorboard/plugins/profile/` in the working directory, as an XPlane for
    TensorBoard's profile plugin and as `perfetto_trace.json.gz` for https://ui.perfetto.dev. Each
    process traces its own devices.
    """

    def __init__(self, workdir: str | os.PathLike, steps: ProfileSteps | None):
        self._directory = str(pathlib.Path(workdir, "tensorboard"))
        self._steps, self._active = steps, False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """Begins step `number`; returns the annotation to run it in."""
        if self._steps and number > self._steps.last:
            self._stop()
        elif self._steps and number >= self._steps.first and not self._active:
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._active = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def _stop(self) -> None:
        if self._active:
            jax.profiler.stop_trace()
            self._active = False
