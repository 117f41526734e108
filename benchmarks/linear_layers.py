"""The linear layers of the embedded model alone, head included: milliseconds by rows.

    python benchmarks/linear_layers.py [--beside few_rows.cpp] [--bits 4] [--rounds 5]

Compiles linear_layers.cpp with the engine's own sources. `--beside` is another C++ program that takes HIDDEN KV_WIDTH
INTERMEDIATE LAYERS VOCABULARY BITS and prints lines `k= 4  2.53 ms ...`. It is compiled for this processor with OpenMP,
and alternates with ours. Figures are medians over rounds, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hatch_build  # noqa: E402

SHAPE = {"hidden": 576, "kv_width": 192, "intermediate": 1536, "layers": 30, "vocabulary": 49152}
LINE = re.compile(r"^k= *(\d+) +([\d.]+) ms")


def compiled(folder: Path) -> Path:
    """Compiles our program with the engine's sources, with the flags of the package."""
    compiler, source = hatch_build.find_compiler(), hatch_build.PACKAGE / "src"
    with hatch_build.alone(work := hatch_build.WORK / "plain"):
        objects = hatch_build.objects(compiler, hatch_build.COMPILE, source, work)
    own = Path(__file__).with_suffix(".cpp")
    flags = [*hatch_build.COMPILE, "-I", str(source), str(own), *map(str, objects)]
    return hatch_build.make(folder / "linear_layers", [*compiler, *flags])


def beside(source: Path, folder: Path) -> Path:
    """Compiles another program for this processor."""
    flags = ["-O3", "-march=native", "-fopenmp", str(source)]
    return hatch_build.make(folder / "beside", [*hatch_build.find_compiler(), *flags])


def timed(command: list[str], threads: int) -> dict[int, float]:
    """Milliseconds by rows, as a program prints them."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return {int(line[1]): float(line[2]) for line in map(LINE.match, output.splitlines()) if line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", type=Path, help="another program's source")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    shape = [*map(str, SHAPE.values()), str(args.bits)]
    with tempfile.TemporaryDirectory() as folder:
        commands = {"ours": [str(compiled(Path(folder))), *shape, str(args.threads), "25"]}
        if args.beside:
            commands[args.beside.stem] = [str(beside(args.beside, Path(folder))), *shape]
        times: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                for rows, milliseconds in timed(command, args.threads).items():
                    times[name][rows].append(milliseconds)
    for name, by_rows in times.items():
        cells = [f"{statistics.median(t):.2f} ({min(t):.2f} to {max(t):.2f})" for t in by_rows.values()]
        print(f"{name:10}", *cells, sep="  ")
    if args.beside:
        ours, other = times["ours"], times[args.beside.stem]
        ratios = {k: statistics.median(b / a for a, b in zip(ours[k], other[k], strict=True)) for k in ours}
        print("times as fast", *(f"k={k}: {ratio:.2f}" for k, ratio in ratios.items()), sep="  ")


if __name__ == "__main__":
    main()
