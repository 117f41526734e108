#!/usr/bin/env bash
# The sixth run on the embedded model, on a CPU: a round of stage 2 for speed from the adapter of the fifth, and what
# the round changed added to the adapter of the second (runs/README.md). Every step goes on where it was cut off: kill it at
# any point and start it again.
#
#     runs/smollm2_sixth_run.sh ANSWERS.jsonl EVAL.jsonl
#
# ANSWERS: {id, prompt, response, source, licence} a line. EVAL: AlpacaEval's form, {index, instruction, outputs}.
# FIFTH: where the fifth run's script has worked (default: its own folder): its prompts and labels.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/steps.sh"
fifth=$(realpath "${FIFTH:-$(dirname "$0")/out/fifth_run}")
after_second sixth_run "$1" "$2"
labels=$fifth/labels.jsonl fork=$PWD/fork second=$start
earlier 7809d32 adapters/fork "$fork" # the fifth run's

# 1. a round of stage 2 for speed: four answers to prompts that should fork, or may
whole should.jsonl drawn "$fifth/should.jsonl" 300
whole may.jsonl drawn "$fifth/may.jsonl" 160
whole prompts.jsonl cat should.jsonl may.jsonl
warm should.jsonl should_answers.jsonl --adapter "$fork" --n 4 --max-tokens 448 --seed 51
warm may.jsonl may_answers.jsonl --adapter "$fork" --n 4 --max-tokens 448 --seed 52
native prompts.jsonl baseline.jsonl --adapter "$root/adapters/baseline" --sequential --max-tokens 512
whole samples.jsonl joined should_answers.jsonl may_answers.jsonl
"$pasta" score samples.jsonl scored.jsonl --baseline baseline.jsonl --references "$answers" --labels "$labels" \
  --scorer reference --length matched > scored.json
sigma=$("$python" -c 'import json; print(json.load(open("scored.json"))["sigma"])')
whole pairs.jsonl "$python" "$here/speed_pairs.py" scored.jsonl --pairs 170
[ -s faster/adapter/README.md ] || "$pasta" train prefer pairs.jsonl --start "$fork" --lambda 1 --length matched \
  --sigma "$sigma" --true-lengths --learning-rate 2e-4 --save-steps 20 --out faster

# 2. what that changed, added to the second run's adapter
[ -s faster_second/adapter_model.safetensors ] ||
  "$python" "$here/add_change.py" "$second" "$fork" faster/adapter faster_second

# 3. greedy answers to the evaluation's prompts
"$pasta" eval "second=$second" "fork=$fork" faster=faster/adapter faster-second=faster_second --prompts "$eval" \
  --baseline "$root/adapters/baseline" --requests "$seqs" --no-matched --max-tokens 768 --public --length matched \
  --labels "$marks/alpaca_eval_dev_forking.jsonl" --engine native --scorer reference --out eval
