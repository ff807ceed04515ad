"""Work ahead on threads: in order, bounded, loud, and never in the way of closing."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from loaders.buffers import Pool
from loaders.prefetch import Prefetch, Workers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workers():
    workers = Workers(3, name="test")
    yield workers
    workers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test")]


def test_results_come_in_order_and_no_more_than_asked_are_under_way(workers):
    drawn = []

    def tasks():
        for number in range(20):
            drawn.append(number)
            yield workers.submit(lambda n=number: time.sleep(0.01 * (n % 3 == 0)) or n, priority=number)

    prefetch = Prefetch(workers, tasks(), ahead=4)
    for expected, got in enumerate(prefetch):
        assert got == expected
        assert len(drawn) <= expected + 4
    assert len(drawn) == 20
    assert prefetch.waited_seconds > 0


def test_tasks_run_after_those_they_need_even_on_one_thread():
    workers, done = Workers(1), []
    first = [workers.submit(lambda n=n: done.append(n), priority=5) for n in range(3)]
    last = workers.submit(lambda: list(done), priority=0, after=first)
    assert workers.wait(last) == [0, 1, 2]
    workers.close()


def test_the_lowest_priority_number_runs_first():
    workers, order, gate = Workers(1), [], threading.Event()
    workers.submit(gate.wait, priority=0)
    tasks = [workers.submit(lambda n=n: order.append(n), priority=n) for n in (3, 1, 2)]
    gate.set()
    for task in tasks:
        workers.wait(task)
    workers.close()
    assert order == [1, 2, 3]


def test_an_error_reaches_the_consumer_through_tasks_that_depend_on_it(workers):
    def fail():
        raise OSError("chunk 7 of data cannot be read")

    broken = workers.submit(fail, priority=0)
    never = []
    middle = workers.submit(lambda: never.append(1), priority=1, after=[broken])
    last = workers.submit(lambda: never.append(2), priority=2, after=[middle])
    with pytest.raises(OSError, match="chunk 7"):
        workers.wait(last)
    later = workers.submit(lambda: never.append(3), priority=3, after=[broken])
    with pytest.raises(OSError, match="chunk 7"):
        workers.wait(later)
    assert not never
    assert workers.wait(workers.submit(lambda: "still alive", priority=4)) == "still alive"


def test_closing_from_another_thread_frees_a_waiting_consumer():
    workers, gate = Workers(1), threading.Event()
    task = workers.submit(gate.wait, priority=0)
    threading.Timer(0.1, workers.close).start()
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(RuntimeError, match="closed while a minibatch was awaited"):
        workers.wait(task)
    workers.close()


def test_results_and_functions_are_let_go(workers):
    class Big:
        pass

    big = Big()
    reference = weakref.ref(big)
    task = workers.submit(lambda held=big: id(held), priority=0)
    workers.wait(task)
    del big
    deadline = time.monotonic() + 2
    while reference() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert reference() is None


def test_a_pool_hands_memory_out_again_only_when_no_view_is_left():
    pool = Pool()
    first = pool.take(1_000, np.int32)
    address = first.ctypes.data
    view = torch.from_numpy(first[10:20]).view(2, 5)
    del first
    second = pool.take(1_000, np.int32)
    assert second.ctypes.data != address
    view.fill_(7)
    del view, second
    third, fourth = pool.take(1_000, np.uint16), pool.take(1_000, np.uint8)
    assert address in {third.ctypes.data, fourth.ctypes.data}
    assert third.dtype == np.uint16
    assert len(third) == len(fourth) == 1_000


SCRIPT = """
    import sys, threading, time
    from loaders.prefetch import Prefetch, Workers

    workers = Workers(2)
    prefetch = Prefetch(workers, (workers.submit(lambda: time.sleep({seconds}), priority=0) for _ in range(9)), ahead=3)
    print("ready", flush=True)
    {body}
"""


def run(body, seconds):
    code = textwrap.dedent(SCRIPT).format(body=body, seconds=seconds)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_ctrl_c_ends_a_consumer_that_waits_for_a_slow_disk():
    with run("next(prefetch)", seconds=60) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) != 0
        assert "KeyboardInterrupt" in process.stderr.read()


def test_an_interpreter_that_exits_does_not_wait_for_readers():
    with run("threading.Thread(target=next, args=[prefetch], daemon=True).start()", seconds=60) as process:
        assert process.stdout.readline() == "ready\n"
        assert process.wait(timeout=10) == 0
        assert process.stderr.read() == ""
