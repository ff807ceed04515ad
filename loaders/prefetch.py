"""Work done ahead on threads: ordered, bounded, and loud when it fails."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")

JOIN_SECONDS = 5.0
"""How long closing waits for a task that is running; a thread stuck in a dead file system is left behind."""


class Task(Generic[T]):
    """A function that runs once the tasks it comes after have ended well."""

    def __init__(self, function: Callable[[], T], priority: int) -> None:
        self.function: Callable[[], T] | None = function
        self.priority = priority
        self.result: T | None = None
        self.error: BaseException | None = None
        self.is_done = False
        self.num_waiting_for = 0
        self.next: list[Task[Any]] = []


def result_of(task: Task[T]) -> T:
    """Result of a task that has ended well, for the tasks that come after it."""
    assert task.is_done
    assert task.error is None
    return task.result  # type: ignore[return-value]


class Workers:
    """Daemon threads that run the ready task of the lowest priority number.

    Tasks never wait on a thread for other tasks, so any number of threads makes progress. As the threads are
    daemons, an interpreter that exits never waits for them.
    """

    def __init__(self, num_threads: int, *, name: str = "loader") -> None:
        self._condition = threading.Condition()
        self._ready: list[tuple[int, int, Task[Any]]] = []
        self._order = itertools.count()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[[], T], *, priority: int, after: Sequence[Task[Any]] = ()) -> Task[T]:
        """Run a function when all of `after` are done; an error of theirs becomes this task's without running it."""
        task = Task(function, priority)
        with self._condition:
            for other in after:
                if other.error is not None:
                    task.error, task.is_done, task.function = other.error, True, None
                    return task
                if not other.is_done:
                    other.next.append(task)
                    task.num_waiting_for += 1
            if task.num_waiting_for == 0:
                self._push(task)
        return task

    def wait(self, task: Task[T]) -> T:
        """Wait for a task and return its result, or raise its error."""
        with self._condition:
            while not task.is_done:
                if self._is_closed:
                    raise RuntimeError("loader: closed while a minibatch was awaited; make a new iterator")
                self._condition.wait()
        if task.error is not None:
            raise task.error
        return task.result  # type: ignore[return-value]

    def close(self) -> None:
        """Drop what has not begun and wait for what runs; safe to call twice and from any thread."""
        with self._condition:
            self._is_closed = True
            self._ready.clear()
            self._condition.notify_all()
        end = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))

    def _push(self, task: Task[Any]) -> None:
        heapq.heappush(self._ready, (task.priority, next(self._order), task))
        self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._ready and not self._is_closed:
                    self._condition.wait()
                if self._is_closed:
                    return
                task = heapq.heappop(self._ready)[2]
            assert task.function is not None
            try:
                task.result = task.function()
            except BaseException as error:  # whatever it is belongs to the thread that waits
                task.error = error
            # The function holds windows; dropping it hands their memory back.
            task.function = None
            with self._condition:
                self._finish(task)
            del task

    def _finish(self, task: Task[Any]) -> None:
        task.is_done = True
        for other in task.next:
            other.num_waiting_for -= 1
            if other.is_done:
                continue
            if task.error is not None:
                other.error, other.function = task.error, None
                self._finish(other)
            elif other.num_waiting_for == 0:
                self._push(other)
        task.next.clear()
        self._condition.notify_all()


class Prefetch(Generic[T]):
    """Hands out the results of tasks in order and keeps `ahead` tasks under way.

    Parameters
    ----------
    tasks
        Made lazily: the next task is drawn from here only when there is room for it.
    ahead
        Tasks under way or finished beyond the one handed out.

    Attributes
    ----------
    waited_seconds
        Time the consumer has waited here.
    """

    def __init__(self, workers: Workers, tasks: Iterable[Task[T]], *, ahead: int) -> None:
        self._workers, self._tasks, self._ahead = workers, iter(tasks), max(1, ahead)
        self._pending: deque[Task[T]] = deque()
        self.waited_seconds = 0.0

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while len(self._pending) < self._ahead and (task := next(self._tasks, None)) is not None:
            self._pending.append(task)
        if not self._pending:
            raise StopIteration
        start = time.perf_counter()
        try:
            return self._workers.wait(self._pending.popleft())
        finally:
            self.waited_seconds += time.perf_counter() - start
