"""What the tests start ranks with: one that hangs is a failing test, which tells where it hung and leaves nothing."""

import pytest
from ranks import start_ranks, wait_for

STUCK = """
import threading
def waits_for_what_never_comes():
    print("at work", flush=True)
    threading.Event().wait()
waits_for_what_never_comes()
"""


def test_a_rank_that_hangs_fails_with_the_stacks_of_all_ranks_and_is_killed() -> None:
    first, _ = started = start_ranks([], 2, code=STUCK)
    wait_for(lambda: all(rank.out.exists() and rank.out.read_text() for rank in started), started)
    with pytest.raises(AssertionError, match="still at work after 0 s") as failed:
        first.ends(0.1)
    assert str(failed.value).count("in waits_for_what_never_comes") == 2
    assert not any(rank.is_alive() for rank in started)
