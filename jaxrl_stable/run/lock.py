"""Lock of a working directory: one run writes to it at a time."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterator

from jaxrl_stable import distributed

FILE = "lock"


@contextlib.contextmanager
def locked(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of a working directory; process 0 holds it for all processes of the run.

    The kernel releases the lock when the process ends, however it ends, so a stale file never
    blocks a restart. The file stays and names the last owner.

    Whether hosts see each other's locks depends on the file system. On NFS they do, but version 3
    never releases the lock of a machine that has vanished. A mounted bucket locks per host. On a
    file system without locks, the run prints a note and continues.

    Raises:
      ValueError: if another run holds the lock; the error names its host, process, user and start.
    """
    if not distributed.is_main():
        yield
        return
    path = pathlib.Path(workdir, FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened for writing, which NFS requires for an exclusive lock, but not truncated: until we hold
    # the lock, the text belongs to the other run.
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = " ".join(file.read().split()) or "another run"
            raise ValueError(
                f"{workdir} is in use by {owner}; wait until that run ends, stop it, or use "
                f"another --workdir (if its machine is gone, delete {path})"
            ) from None
        except OSError as error:
            print(
                f"note: {path} cannot be locked ({error.strerror}); make sure that no other run "
                "writes to this directory",
                file=sys.stderr,
            )
        else:
            file.truncate(0)
            file.write(_owner() + "\n")
            file.flush()
        yield


def _owner() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a user id without a name
        user = str(os.getuid())
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"{user}, process {os.getpid()} on {socket.gethostname()}, since {since}"
