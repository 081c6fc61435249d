"""When and how a program asks jax for other processes."""

import jax
import pytest

from jaxrl_stable import distributed
from jaxrl_stable.distributed import processes

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
OURS = dict(
    coordinator_address="10.0.0.1:1234",
    num_processes=4,
    process_id=3,
    cluster_detection_method="deactivate",
)
NAMES = (*EXPLICIT, *processes.TASKS, "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES")


@pytest.fixture
def asked(monkeypatch):
    """Returns the arguments of `jax.distributed.initialize`, or None if it was not called."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    before = jax.config.jax_platforms

    def ask(environment, platforms="cpu"):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        calls.clear()
        jax.config.update("jax_platforms", platforms)
        distributed.initialize()
        for call in calls:
            assert call.pop("heartbeat_timeout_seconds") <= 60
        return calls[0] if calls else None

    yield ask
    jax.config.update("jax_platforms", before)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("environment", "platforms", "expected"),
    [
        ({}, "cpu", None),
        ({}, None, None),
        (EXPLICIT, "cpu", OURS),
        (EXPLICIT, "tpu,cpu", OURS),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, "cpu", None),
        ({}, "tpu,cpu", {}),  # what jax itself sets on a TPU VM; the metadata server has the rest
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", {}),
        ({"TPU_WORKER_HOSTNAMES": "a"}, "tpu,cpu", None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "tpu,cpu", {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", None),  # a user tries something on one host
        ({"SLURM_STEP_NUM_TASKS": "8"}, "cpu", {}),
        ({"SLURM_STEP_NUM_TASKS": "1"}, "cpu", None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "cuda", {}),
    ],
)
def test_who_finds_the_processes(asked, environment, platforms, expected):
    assert asked(environment, platforms) == expected


@pytest.mark.fast
@pytest.mark.parametrize(
    "change", [{"JAX_PROCESS_ID": None}, {"JAX_COORDINATOR_ADDRESS": None}, {"JAX_PROCESS_ID": "x"}]
)
def test_places_that_are_not_whole(asked, change):
    environment = {name: v for name, v in (EXPLICIT | change).items() if v is not None}
    with pytest.raises(ValueError, match="set all of JAX_COORDINATOR_ADDRESS"):
        asked(environment)


@pytest.mark.fast
def test_a_tpu_without_a_cluster_is_one_process(asked, monkeypatch):
    def nobody(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    assert asked({}, "tpu,cpu") is None
