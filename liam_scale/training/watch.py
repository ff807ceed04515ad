"""Which rank keeps the others waiting: each tells what it is at, and all see who falls silent."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from liam_scale.training.ranks import LostRank

SECONDS_BETWEEN_BEATS = 1.0
SECONDS_TO_TELL = 5.0
"""For the others to see that a rank is gone or has failed."""

_BROKEN = re.compile(
    r"gloo|nccl|c10d|process ?group|closed by peer|connection reset|broken pipe|timed out waiting", re.IGNORECASE
)
_FAILED = "failed"


@dataclass
class _Seen:
    """A rank as another one sees it."""

    host: str = ""
    phase: str = "joining the other ranks"
    count: int = -1
    beat: int = -1
    lives_at: float = math.inf
    """When its last beat came; before it told any, when that was first seen."""
    goes_on_at: float = 0.0
    """When it last began something new."""


class Watch:
    """Watches the ranks of a run from a thread of each, through the store by which they found each other.

    A rank that is stopped, or whose reading hangs, leaves the others in a collective that nothing interrupts. When no
    rank has begun anything new for so many seconds, one of them names those that are behind, and all end.
    """

    def __init__(self, rank: int, size: int, *, timeout_seconds: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout_seconds
        self._interval = min(SECONDS_BETWEEN_BEATS, timeout_seconds / 10)
        self._phase, self._count, self._beat = _Seen.phase, 0, 0
        self._seen = [_Seen() for _ in range(size)]
        self._store: dist.TCPStore | None = None
        self._ended = threading.Event()
        self._awake_at = self._heard_at = time.monotonic()
        for work in (self._talk, self._judge):
            threading.Thread(target=work, daemon=True, name="watch").start()

    def enters(self, phase: str) -> None:
        """The main thread begins something; all ranks begin the same things in the same order."""
        self._phase, self._count = phase, self._count + 1

    def joined(self, hosts: list[str]) -> None:
        """All ranks have come, from these machines: one that falls silent before it has told anything has a name."""
        for rank, host in enumerate(hosts):
            if not self._seen[rank].host:
                self._seen[rank] = _Seen(host, goes_on_at=time.monotonic())

    def close(self) -> None:
        self._ended.set()

    def explained(self, error: BaseException) -> BaseException:
        """A broken collective in words: who is gone. Any other error as it is, and the others hear of it."""
        if not isinstance(error, RuntimeError) or not _BROKEN.search(str(error)):
            self._phase = _FAILED
            with suppress(RuntimeError, OSError):
                self._tell()
                if self.rank == 0:
                    self._wait_until_heard()
            return error
        with suppress(ValueError):  # torchrun ends the others as soon as one has ended, and one of them is to tell why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        deadline = time.monotonic() + SECONDS_TO_TELL
        while time.monotonic() < deadline:
            time.sleep(self._interval / 4)
            if any(seen.phase == _FAILED for seen in self._seen):
                return LostRank("another rank has failed", teller=None)
            gone = self._silent() or ([0] if self._is_cut_off() else [])
            if gone:
                return LostRank(self._describe(gone, "is gone"), teller=self._teller(gone))
        return error

    def _wait_until_heard(self) -> None:
        """The store through which the others hear that this rank has failed may end with it: they look now and then."""
        deadline = time.monotonic() + 2 * self._interval + 0.5
        while time.monotonic() < deadline and any(seen.phase != _FAILED for seen in self._seen[1:]):
            time.sleep(self._interval / 20)
            self._look()

    def _talk(self) -> None:
        while not self._ended.wait(self._interval):
            with suppress(RuntimeError, OSError):
                self._tell()
                self._look()
                self._heard_at = time.monotonic()

    def _judge(self) -> None:
        """On a thread of its own: where the rank that holds the store is asleep, talking to it never ends."""
        before = time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            if now - before > 5 * self._interval + 5.0:
                self._awake_at = now  # This process itself was asleep, or its machine.
            before = now
            if now - max(self._awake_at, *(seen.goes_on_at for seen in self._seen)) > self.timeout:
                self._give_up()

    def _connected(self) -> dist.TCPStore:
        if self._store is None:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # torch itself tells on the screen of each attempt that fails.
            socket.create_connection((host, port), timeout=self._interval).close()
            wait = timedelta(seconds=max(1.0, self.timeout / 4))
            self._store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
        return self._store

    def _key(self, rank: int) -> str:
        # torchrun's own store outlives a start: what was told before it is another matter. Else each start has its own
        # store, and nodes that came later have counted fewer starts.
        is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if is_shared else 0
        return f"liam/{start}/{rank}"

    def _tell(self) -> None:
        self._beat += 1
        told = [socket.gethostname(), self._phase, self._count, self._beat]
        self._connected().set(self._key(self.rank), json.dumps(told))

    def _look(self) -> None:
        store, now = self._connected(), time.monotonic()
        come = [rank for rank in range(self.size) if self._seen[rank].beat >= 0 or store.check([self._key(rank)])]
        for rank, told in zip(come, store.multi_get([self._key(rank) for rank in come]), strict=True):
            seen = self._seen[rank]
            host, phase, count, beat = json.loads(told)
            lives_at = now if beat != seen.beat else seen.lives_at
            goes_on_at = now if count != seen.count else seen.goes_on_at
            self._seen[rank] = _Seen(host, phase, count, beat, lives_at, goes_on_at)
        for seen in self._seen:
            seen.lives_at = min(seen.lives_at, now)

    def _is_cut_off(self) -> bool:
        """Rank 0, which holds the store, does not answer."""
        return time.monotonic() - self._heard_at > 3 * self._interval + 0.5

    def _silent(self) -> list[int]:
        oldest = time.monotonic() - 3 * self._interval - 0.5
        others = [(rank, seen) for rank, seen in enumerate(self._seen) if rank != self.rank]
        return [rank for rank, seen in others if seen.host and seen.lives_at < oldest]

    def _give_up(self) -> NoReturn:
        """End this process; the main thread may stand where no exception reaches it."""
        missing = [rank for rank, seen in enumerate(self._seen) if not seen.host]
        least = min(seen.count for seen in self._seen)
        behind = [rank for rank, seen in enumerate(self._seen) if seen.count == least]
        late = [0] if self._is_cut_off() else missing or self._silent() or behind
        if self.rank == self._teller(late):
            told = self._describe(late, f"has not gone on for {self.timeout:,.0f} s")
            print(f"{os.linesep if sys.stderr.isatty() else ''}error: {told}", file=sys.stderr, flush=True)
        else:
            time.sleep(1.0)  # torchrun ends all ranks as soon as one has ended: the one that tells must be first.
        os._exit(1)

    def _teller(self, late: list[int]) -> int:
        return next((rank for rank in range(self.size) if rank not in late), 0)

    def _describe(self, late: list[int], what: str) -> str:
        names = []
        for rank in late[:5]:
            seen = self._seen[rank]
            where = f"on {seen.host} {what}; it was last at: {seen.phase}" if seen.host else "has not come"
            names.append(f"rank {rank} {where}")
        more = f", and {len(late) - 5:,} more" if len(late) > 5 else ""
        return (
            f"ranks: {', '.join(names)}{more}; all {self.size:,} processes end. Look at that machine (memory, storage, "
            "network), then run the same command again: it goes on from the last checkpoint. --timeout gives more time"
        )
