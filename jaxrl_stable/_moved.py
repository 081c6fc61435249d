"""Old import paths. They still work, each with one line that says what to write instead."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Iterable

PACKAGE = __name__.rpartition(".")[0]

# Old module -> new module.
MODULES = {
    "batch": "trainer.batch",
    "data.files": "files",
    "data.packing": "data.demonstrations",
    "describe": "run.describe",
    "dynamic_sampling": "run.dynamic_sampling",
    "gates": "run.gates",
    "judge": "run.judge",
    "metrics": "run.writer",
    "model.layout": "sharding.layout",
    "optimizer": "trainer.optimizer",
    "packing": "trainer.packing",
    "preemption": "distributed.preemption",
    "quantize": "sampler.quantize",
    "rollout": "sampler.rollout",
    "rows": "sharding.rows",
    "samples": "run.samples",
    "start": "run.start",
    "study.analysis": "study.results.analysis",
    "study.claims": "study.results.claims",
    "study.comparison": "study.results.comparison",
    "study.markdown": "study.results.markdown",
    "study.page": "study.results.page",
    "study.panels": "study.results.panels",
    "study.replay": "study.results.evidence",
    "study.survival": "study.results.survival",
    "study.tables": "study.results.tables",
    "study.verdicts": "study.results.verdicts",
    "study.viewer": "study.samples",
    "tabular": "study.tabular",
    "task": "run.task",
    "uncached": "sampler.uncached",
    "update": "trainer.update",
    "watch": "distributed.watch",
}

# Names that left a module which still exists (or moved under its old path): (module, name) -> where
# and under which name they are now.
NAMES = {
    ("array_tasks", "Task"): ("array_tasks", "ArrayTask"),
    ("array_tasks.task", "Task"): ("array_tasks", "ArrayTask"),
    ("study.runs", "Run"): ("study.runs", "RunState"),
    ("data.tokenizer", "BOS_ID"): ("data.vocabulary", "BOS_ID"),
    ("data.tokenizer", "EOS_ID"): ("data.vocabulary", "EOS_ID"),
    ("data.tokenizer", "PAD_ID"): ("data.vocabulary", "PAD_ID"),
    ("data.tokenizer", "UNK_ID"): ("data.vocabulary", "UNK_ID"),
    ("data.tokenizer", "train_sentencepiece"): ("data.vocabulary", "train_sentencepiece"),
    ("evaluate", "Sampler"): ("run.evaluation", "Sampler"),
    ("update", "hidden_states"): ("trainer.forward", "hidden_states"),
    ("update", "response_log_probs"): ("trainer.forward", "response_log_probs"),
    ("data.files", "write_atomically"): ("files", "write_atomic"),
    ("evaluate", "Result"): ("run.evaluation", "Result"),
    ("evaluate", "evaluate"): ("run.evaluation", "evaluate"),
    ("evaluate", "evaluation_key"): ("run.evaluation", "evaluation_key"),
    ("evaluate", "make_sampler"): ("run.evaluation", "make_sampler"),
    ("metrics", "read_jsonl"): ("files", "read_jsonl"),
    ("dynamic_sampling", "fill_rows"): ("trajectory", "fill_rows"),
    ("metrics", "visible"): ("text", "visible"),
    ("metrics", "write_atomic"): ("files", "write_atomic"),
    ("objective", "Decided"): ("objective", "LossDetails"),
    ("objective", "one_of"): ("checks", "one_of"),
    ("program", "configured"): ("gin_files", "configured"),
    ("program", "load_experiment"): ("gin_files", "load_experiment"),
    ("program", "settled"): ("gin_files", "settled"),
    ("sft", "supervised_update"): ("trainer.supervised", "supervised_update"),
    ("sft", "train"): ("run.cold_start", "run_cold_start"),
    ("rollout", "Trajectory"): ("trajectory", "Trajectory"),
    ("rollout", "join_trajectories"): ("trajectory", "join_trajectories"),
    ("sharding", "spread"): ("sharding", "for_sampling"),
    ("study.analysis", "Cell"): ("study.results.analysis", "CellRuns"),
    ("study.analysis", "Collapse"): ("study.config", "Collapse"),
    ("study.claims", "PAPER"): ("study.config", "PAPER"),
    ("train", "Programs"): ("run.programs", "Programs"),
    ("train", "make_programs"): ("run.programs", "make_programs"),
    ("update", "Scored"): ("trainer.score", "Scored"),
    ("update", "policy_log_probs"): ("trainer.forward", "policy_log_probs"),
    ("update", "score"): ("trainer.score", "score"),
    ("update", "with_old_policy"): ("trainer.score", "with_old_policy"),
}


def install() -> None:
    """Makes the old module paths importable."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())


def moved_names(module: str) -> Callable[[str], object]:
    """Returns a module's `__getattr__` (PEP 562) for the names that have left it.

    Args:
      module: full name of the module that they left.
    """
    old = module.removeprefix(f"{PACKAGE}.")

    def __getattr__(name: str) -> object:
        if (old, name) not in NAMES:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, new_name = NAMES[old, name]
        _warn(f"{module}.{name}", f"{PACKAGE}.{home}.{new_name}")
        return getattr(importlib.import_module(f"{PACKAGE}.{home}"), new_name)

    return __getattr__


class _OldPaths(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds old modules after all other finders have failed."""

    def find_spec(
        self,
        fullname: str,
        path: Iterable[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.removeprefix(f"{PACKAGE}.") not in MODULES or "." not in fullname:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: types.ModuleType) -> None:
        old = module.__name__.removeprefix(f"{PACKAGE}.")
        new = f"{PACKAGE}.{MODULES[old]}"
        _warn(module.__name__, new)
        stand_in = _OldModule(module.__name__)
        own = {"__name__", "__spec__", "__loader__", *(name for m, name in NAMES if m == old)}
        contents = importlib.import_module(new).__dict__.items()
        stand_in.__dict__.update((name, x) for name, x in contents if name not in own)
        stand_in.__spec__, stand_in.__loader__ = module.__spec__, self
        stand_in.__dict__["__getattr__"] = moved_names(module.__name__)
        sys.modules[module.__name__] = stand_in  # what the import statement then returns


class _OldModule(types.ModuleType):
    """Copy of a module under its old path.

    `jaxrl_stable.rollout`, `update` and `quantize` are functions today and were modules. Importing
    the old module replaces the function in the package, so the old module can be called like it.
    """

    def __call__(self, *args: object, **kwargs: object) -> object:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} has moved; write {new}", FutureWarning, stacklevel=3)
