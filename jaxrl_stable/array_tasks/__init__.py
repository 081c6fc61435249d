"""Tasks on the device: prompts, teacher solutions and rewards as pure functions of arrays.

With such tasks, a whole reinforcement-learning run is one program that can be jitted and mapped
over seeds. Everything works under `jax.jit` and `jax.vmap`; the task itself is a static argument.

    task             prompt → response                       skill
    Reverse          d a c =        → c a d                  copying by position
    Sort             d a c =        → a c d                  comparing
    ModularAddition  17 + 9 =       → 3                      memorising a table (here modulo 23)
    ChainSum         7 + 8 + 4 =    → 5 9                    working step by step (modulo 10)
    Parity           1 0 1 1 =      → 1 0 1                  working step by step (one bit)
    Countdown        3 5 7 -> 2 2   → 3 * 5 + 7              searching; many responses are correct

A teacher can make random mistakes in its solutions, called slips (`ArrayTask.solutions`).

One file per family:

    task.py        Problems, and the common base: ids, the held-out split, the teacher's slips
    series.py      tasks with one correct response to a series of symbols, and their grading
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
