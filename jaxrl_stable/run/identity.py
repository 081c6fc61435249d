"""The identity of a run: settings that a checkpoint records and that a resumed run must share.

If the held-out set, the reward or the evaluation changed, the curve and the ranking of checkpoints
would compare scores that are not comparable. If the origin changed, the settings would describe a
run that never happened. Everything else (learning rate, objective, number of steps, …) may change
on resume.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any

from jaxrl_stable.configs import Experiment
from jaxrl_stable.data import Source, open_source
from jaxrl_stable.rewards import Reward

Settings = dict[str, Any]  # field → value, as JSON
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the default `repr` of an object


def data_of_run(experiment: Experiment, task_identity: str) -> str:
    """Describes the data in which a checkpoint's position in the prompts is meaningful."""
    prompts = experiment.reinforcement.prompts
    return f"{task_identity}, {prompts} prompts a step, seed {experiment.seed}"


def settings_of_run(experiment: Experiment, heldout: Source, reward: Reward) -> Settings:
    """Returns the settings of a run that must not change on resume.

    Args:
      experiment: the experiment.
      heldout: held-out problems; the evaluated ones are identified by their content.
      reward: the reward.
    """
    data, evaluation, rl = experiment.data, experiment.evaluation, experiment.reinforcement
    settings: Settings = {
        "Data.heldout": _content(heldout, evaluation.problems),
        "Data.reward": data.reward,
        "Data.reward_special_tokens": data.reward_special_tokens,
        "right_at of the reward": reward.right_at,
    }
    # `batch_size` determines a response's random numbers; `every` only when it is sampled.
    settings |= _fields("Evaluation", evaluation, without=("every",))
    # Responses are as long as in training, unless the evaluation has a limit of its own.
    settings["Evaluation.max_tokens"] = evaluation.max_tokens or rl.max_tokens
    return settings | settings_of_start(experiment)


def settings_of_start(experiment: Experiment) -> Settings:
    """Returns the settings for the start of a run: other weights, a cold start, or both."""
    cold_start = experiment.cold_start
    settings = settings_of_origin(experiment)
    settings["Experiment.cold_start"] = None if cold_start is None else "Supervised"
    if cold_start is not None:
        source = cold_start.demonstrations
        files = source if isinstance(source, list | tuple) else [source]
        # Files are needed to start a run, not to resume it.
        if all(os.path.exists(file) for file in files if isinstance(file, str | os.PathLike)):
            opened = None if source is None else open_source(source)
            settings["Supervised.demonstrations"] = _plain(opened)
        settings |= _fields(
            "Supervised", cold_start, without=("demonstrations", "checkpoint_every")
        )
    return settings


def settings_of_origin(experiment: Experiment) -> Settings:
    """Returns the setting for the origin of the first weights."""
    origin = experiment.init_from
    return {"Experiment.init_from": os.path.normpath(origin) if origin else ""}


def _fields(prefix: str, config: Any, without: tuple[str, ...]) -> Settings:
    return dict(_flattened(prefix, config, without))


def _flattened(prefix: str, config: Any, without: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yields one entry per field, so that a field from a later version makes no difference."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}.{field.name}"
        if field.name in without:
            continue
        if dataclasses.is_dataclass(value):
            yield from _flattened(name, value, ())
        else:
            yield name, _plain(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _ADDRESS.sub("", repr(value))


def _content(source: Source, count: int) -> str:
    """Returns a checksum of the first problems; it does not depend on their file or class."""
    crc32 = 0
    for i in range(count):
        text = json.dumps(source[i], sort_keys=True, default=_plain)
        crc32 = zlib.crc32(text.encode(), crc32)
    return f"{count} problems with crc32 {crc32:08x}"
