"""How runs are mapped; what is compiled ahead, and what happens if it is no longer needed."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.study import programs
from jaxrl_stable.study.programs import made_ahead, over_runs


@pytest.mark.parametrize("vmapped", [False, True, None])
def test_each_run_gets_its_own_and_the_shared(vmapped):
    """A loop adds no batch dimension to the function's operations; `vmap` has no loop."""

    def function(run, shared):
        return {"x": run["x"] @ run["w"] + shared, "sum": run["w"].sum()}

    rng = np.random.default_rng(0)
    runs = {"x": rng.normal(size=(3, 2, 4)), "w": rng.normal(size=(3, 4, 5))}
    mapped = over_runs(function, jax.devices()[:1], vmapped)
    got = mapped(jax.tree.map(jnp.float32, runs), jnp.float32(2))
    for i in range(3):
        np.testing.assert_allclose(got["x"][i], runs["x"][i] @ runs["w"][i] + 2, rtol=1e-5)
        np.testing.assert_allclose(got["sum"][i], runs["w"][i].sum(), rtol=1e-5)
    program = str(jax.make_jaxpr(mapped)(runs, 2.0))
    loops = vmapped is False or (vmapped is None and jax.default_backend() == "cpu")
    assert ("length=3" in program) == loops
    assert ("f32[2,5] = dot_general" in program) == loops
    assert ("f32[3,2,5] = dot_general" in program) != loops


def maker(number, made, gate):
    def make():
        gate.wait(10)
        made.append(number)
        return number

    return make


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setattr(programs.os, "cpu_count", lambda: 1)


def test_made_in_order_without_being_asked(one_thread):
    made, gate = [], threading.Event()
    gate.set()
    with made_ahead([maker(i, made, gate) for i in range(4)]) as ahead:
        for i, count in enumerate((2, 3, 4, 4)):
            assert next(ahead) == i
            until(lambda count=count: len(made) >= count)
            time.sleep(0.05)
            assert made == list(range(count)), "memory for more programs than one ahead"
        with pytest.raises(StopIteration):
            next(ahead)


def test_nobody_waits_for_what_is_no_longer_wanted(one_thread):
    """A study that stops at an error does not continue to compile its other programs."""
    made, gate = [], threading.Event()
    with (
        pytest.raises(ValueError, match="first"),
        made_ahead([maker(i, made, gate) for i in range(9)]),
    ):
        threading.Timer(0.2, gate.set).start()
        raise ValueError("first")
    assert len(made) <= 1


def test_an_error_is_raised_where_its_program_is_wanted(one_thread):
    def fail():
        raise ValueError("no such objective")

    with made_ahead([lambda: 1, fail]) as ahead:
        assert next(ahead) == 1
        with pytest.raises(ValueError, match="no such objective"):
            next(ahead)


def test_several_hosts_compile_when_asked(monkeypatch):
    """Programs compile in the order in which the main thread asks for them."""
    monkeypatch.setattr(programs.jax, "process_count", lambda: 2)
    made, gate = [], threading.Event()
    gate.set()
    with made_ahead([maker(i, made, gate) for i in range(3)]) as ahead:
        assert made == []
        assert next(ahead) == 0
        time.sleep(0.05)
        assert made == [0]


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
