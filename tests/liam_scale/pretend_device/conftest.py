"""The tests in `inside` need a process that knows the pretend device before its first backward pass: see test_gate."""

import os

collect_ignore = [] if "LIAM_SCALE_PRETEND" in os.environ else ["inside"]
