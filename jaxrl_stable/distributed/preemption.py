"""Graceful stop on SIGTERM: the loop finishes its step, saves, and exits."""

from __future__ import annotations

import signal
import types

from jaxrl_stable import distributed


class StopRequest:
    """Context manager that records SIGTERM.

    Spot machines receive it seconds before they are reclaimed. The first signal is only recorded; a
    second one ends the process at once, as it would without this context manager.
    """

    def __init__(self) -> None:
        self._noted = False

    def __enter__(self) -> StopRequest:
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def agreed(self) -> bool:
        """Returns whether any process was asked to stop; all processes call it after each step."""
        return bool(distributed.any_process(self._noted))

    def _note(self, signum: int, frame: types.FrameType | None) -> None:
        self._noted = True
        signal.signal(signal.SIGTERM, self._previous)


class Stopped(SystemExit):
    """Raised when a requested stop is complete; exits with status 0."""

    def __init__(self, step: int, directory: str) -> None:
        if distributed.is_main():
            print(
                f"stopped by SIGTERM after step {step}, saved in {directory}; "
                "run the same command to continue",
                flush=True,
            )
        super().__init__(0)
