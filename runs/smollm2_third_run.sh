#!/usr/bin/env bash
# The third run on the embedded model, on a CPU, from the adapter of the second: when to fork (runs/README.md). Every step
# goes on where it was cut off: kill it at any point and start it again.
#
#     runs/smollm2_third_run.sh ANSWERS.jsonl EVAL.jsonl
#
# ANSWERS: {id, prompt, response, source, licence} a line. EVAL: AlpacaEval's form, {index, instruction, outputs}.
# START: the adapter to start from (default: the second run's, out of this repository's history).
set -euo pipefail
source "$(dirname "$(realpath "$0")")/steps.sh"
after_second third_run "$1" "$2"
score() {
  "$pasta" score "$1" "$2" --baseline baseline.jsonl --scorer reference --references "$answers" \
    --labels "$marks/third_run_forking.jsonl" --length smaller > "$2.json"
}

# 1. four answers each to prompts that were labelled by hand; sequential ones where every answer of a prompt for one thread forks
whole prompts.jsonl "$python" "$here/labelled_prompts.py" "$answers" "$marks/third_run_forking.jsonl"
native prompts.jsonl baseline.jsonl --adapter "$root/adapters/baseline" --sequential --max-tokens 512
warm prompts.jsonl samples.jsonl --adapter "$start" --n 4 --max-tokens 512 --seed 29
whole missing.jsonl "$python" "$here/mistaken.py" "$marks/third_run_forking.jsonl" samples.jsonl --only one --ended
warm missing.jsonl sequential.jsonl --adapter "$start" --sequential --n 2 --max-tokens 448 --seed 31

# 2. pairs: where one thread is right, an answer that forks is the worse one
score samples.jsonl scored.jsonl
score sequential.jsonl scored_sequential.jsonl
sigma=$("$python" -c 'import sys; from pathlib import Path; from pastalm.records import scores; print(scores.spread(scores.read(Path(sys.argv[1]))))' scored.jsonl)
whole pairs.jsonl "$python" "$here/fork_pairs.py" scored.jsonl scored_sequential.jsonl \
  --labels "$marks/third_run_forking.jsonl" --sigma "$sigma" --pairs "${PAIRS:-283}"
[ -s prefer/adapter/README.md ] || "$pasta" train prefer pairs.jsonl --start "$start" --lambda 2 --length smaller \
  --true-lengths --save-steps 20 --batch-tokens 2048 --learning-rate 2e-4 --row-learning-rate 1e-3 --sigma "$sigma" --out prefer

# 3. greedy answers to the evaluation's prompts
"$pasta" eval "shipped=$start" round3=prefer/adapter --prompts "$eval" --baseline "$root/adapters/baseline" \
  --requests "$seqs" --no-matched --max-tokens 768 --public --length matched \
  --labels "$marks/alpaca_eval_dev_forking.jsonl" --engine native --out eval
