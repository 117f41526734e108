"""Killed at random moments, the real commands go on to what they would have left. `python tests/kill.py` tries more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_command_that_was_killed_goes_on_to_the_same_bytes() -> None:
    """Each of annotate, sample, score, eval, train sft and train prefer, on data that are quickly done."""
    words = [sys.executable, str(Path(__file__).with_name("kill.py")), "--moments", "1", "--seed", "7", "--small"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 left the same bytes") == 6
    assert done.stdout.count("killed 0 times") < 6, "one at least was killed before it had ended"
