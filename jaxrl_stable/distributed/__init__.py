"""The processes of a run: how they start, agree, exchange rows, and end together."""

from jaxrl_stable.distributed.processes import (
    BARRIER,
    any_process,
    check_same,
    check_shared,
    initialize,
    is_main,
    replicated,
    several,
    wait_for_all,
)
from jaxrl_stable.distributed.rows import gather_rows, held_rows, holders, on_host, row_owners

__all__ = [
    "BARRIER",
    "any_process",
    "check_same",
    "check_shared",
    "gather_rows",
    "held_rows",
    "holders",
    "initialize",
    "is_main",
    "on_host",
    "replicated",
    "row_owners",
    "several",
    "wait_for_all",
]
