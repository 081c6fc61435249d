"""SIGTERM becomes a request: the loop finishes its step, saves, and exits."""

from __future__ import annotations

import signal
import types


class StopRequest:
    """Context manager; `requested` turns True when SIGTERM arrives.

    Spot machines get it seconds before they go. The first signal is only noted; a second one ends
    the process at once, as it would without this.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, signum: int, frame: types.FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, self._previous)


class Stopped(SystemExit):
    """Raised after a requested stop was carried out; exits with status 0."""

    def __init__(self, step: int, directory: str) -> None:
        print(
            f"stopped by SIGTERM after step {step}, saved in {directory}; "
            "run the same command to go on",
            flush=True,
        )
        super().__init__(0)
