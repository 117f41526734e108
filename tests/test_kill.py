"""Killed at random moments, the real commands go on to what they would have left. `python tests/kill.py` tries more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("command", ["annotate", "sample", "score", "eval", "sft", "prefer"])
def test_a_command_that_was_killed_goes_on_to_the_same_bytes(command: str) -> None:
    words = [sys.executable, str(Path(__file__).with_name("kill.py")), "--moments", "2", "--seed", "7", command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 left the same bytes" in done.stdout
