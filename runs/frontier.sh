#!/usr/bin/env bash
# Quality against speed, everything on one chart: results/frontier/. Every step goes on where it was cut off; an hour and
# more on 2 cores. Its times are those of a machine that does nothing else.
#
#     runs/frontier.sh PROMPTS.jsonl     # AlpacaEval's form, {index, instruction, outputs}
#
# Systems: every adapter of adapters/ against Baseline-SFT, the adapter that ships, it with prompt lookup in its threads
# (shipped-lookup), Skeleton-of-Thought with and without its router, prompt lookup, LLMA, and what MORE names
# ("apar-small=FOLDER": smollm2_two_stage.sh makes that adapter). All run on the native engine with its default weights. TIMED
# prompts are answered one at a time, for the clock, the others REQUESTS at once. LIMIT=3 tries it on three prompts, in
# out/frontier-3.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/measure.sh"
begin frontier "$1"

systems=()
for folder in "$root"/adapters/*/; do
  name=$(basename "$folder")
  [ "$name" = baseline ] || [ ! -s "$folder/adapter_config.json" ] || systems+=("$name=${folder%/}")
done
for more in ${MORE:-}; do
  [ -s "${more#*=}/adapter_config.json" ] || { echo "there is no adapter at ${more#*=}" >&2; exit 2; }
  systems+=("$more")
done
systems+=(shipped=auto shipped-lookup=auto+lookup sot sot-routed lookup llma)

measure "${systems[@]}"

# every answer by its prompt's id, without the prompt
"$python" - "$out/answers" "$results/answers.jsonl.xz" << 'PYTHON'
import json, lzma, sys
from pathlib import Path
from pastalm.records import jsonl
with lzma.open(sys.argv[2], "wt", encoding="utf-8", preset=9) as file:
    for path in sorted(Path(sys.argv[1]).glob("*.jsonl")):
        for _, row in jsonl.read(path):
            rest = {key: value for key, value in row.items() if key not in ("prompt", "references", "reference")}
            file.write(json.dumps({"system": path.stem, **rest}, ensure_ascii=False) + "\n")
PYTHON
