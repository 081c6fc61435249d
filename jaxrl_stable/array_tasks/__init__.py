"""Tasks on the device: prompts, teacher solutions and rewards as pure functions of arrays.

With them a whole reinforcement-learning run is one program, which can be jitted and mapped over
seeds. Everything works under `jax.jit` and `jax.vmap`; the task itself is a static argument.

    task             prompt → response                       skill
    Reverse          d a c =        → c a d                  to copy by position
    Sort             d a c =        → a c d                  to compare
    ModularAddition  17 + 9 =       → 3                      a table (here modulo 23)
    ChainSum         7 + 8 + 4 =    → 5 9                    to work step by step (modulo 10)
    Parity           1 0 1 1 =      → 1 0 1                  to work step by step (one bit)
    Countdown        3 5 7 -> 2 2   → 3 * 5 + 7              to search; many responses are right

One file per family:

    task.py        Problems, and the common base: ids, the held-out split, the teacher's slips
    series.py      tasks with one right response to a series of symbols, and their grading
    sequences.py   Reverse, Sort
    arithmetic.py  ModularAddition, ChainSum, Parity
    countdown.py   Countdown, and its parser
"""

from jaxrl_stable import _moved
from jaxrl_stable.array_tasks.arithmetic import ChainSum, ModularAddition, Parity
from jaxrl_stable.array_tasks.countdown import Countdown
from jaxrl_stable.array_tasks.sequences import Reverse, Sort
from jaxrl_stable.array_tasks.task import ArrayTask, Problems, is_heldout

__all__ = [
    "ArrayTask",
    "ChainSum",
    "Countdown",
    "ModularAddition",
    "Parity",
    "Problems",
    "Reverse",
    "Sort",
    "is_heldout",
]


__getattr__ = _moved.moved_names("jaxrl_stable.array_tasks")  # names that have moved
