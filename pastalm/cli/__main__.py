"""`python -m pastalm.cli`: the command, for launchers that take a module (accelerate's)."""

from pastalm.cli import main

main()
