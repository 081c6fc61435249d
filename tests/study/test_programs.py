"""What is compiled ahead, and when nobody waits for it any more."""

import threading
import time

import pytest

from jaxrl_stable.study import programs
from jaxrl_stable.study.programs import made_ahead


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
    """A study that stops at its first error does not go on to compile its other programs."""
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
    """In one order: that in which the main thread asks."""
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
