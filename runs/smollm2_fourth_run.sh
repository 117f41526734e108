#!/usr/bin/env bash
# The fourth run on the embedded model, on a CPU, from the adapter of the second: the decision to fork (runs/README.md).
# Every step goes on where it was cut off: kill it at any point and start it again.
#
#     runs/smollm2_fourth_run.sh ANSWERS.jsonl EVAL.jsonl
#
# ANSWERS: {id, prompt, response, source, licence} a line. EVAL: AlpacaEval's form, {index, instruction, outputs}.
# START: the adapter to start from (default: the second run's, out of this repository's history).
set -euo pipefail
source "$(dirname "$(realpath "$0")")/steps.sh"
after_second fourth_run "$1" "$2"
prompts() { "$python" "$here/labelled_prompts.py" "$answers" labels.jsonl --only "$1"; }

# 1. the beginnings of its greedy answers: in one thread where that is right, forking where they should
whole labels.jsonl cat "$marks/rounds_forking.jsonl" "$marks/third_run_forking.jsonl"
whole one.jsonl prompts one
whole should.jsonl prompts should
whole may.jsonl prompts may
native one.jsonl one_answers.jsonl --adapter "$start" --sequential --max-tokens 64
native should.jsonl should_answers.jsonl --adapter "$start" --max-tokens 256
native may.jsonl may_answers.jsonl --adapter "$start" --max-tokens 256
whole answers.jsonl joined one_answers.jsonl should_answers.jsonl may_answers.jsonl

# 2. the decision alone; `fork_eager` forks where an answer may, too
train() {
  [ -s "$1/adapter/README.md" ] || "$pasta" train fork answers.jsonl --labels labels.jsonl --start "$start" --save-steps 25 \
    --out "$@"
}
train fork --epochs 3 --fork-weight 16
train fork_eager --epochs 2.5 --eager

# 3. greedy answers to the evaluation's prompts
"$pasta" eval "second=$start" fork=fork/adapter fork_eager=fork_eager/adapter --prompts "$eval" --baseline "$root/adapters/baseline" \
  --requests "$seqs" --no-matched --max-tokens 768 --public --length matched \
  --labels "$marks/alpaca_eval_dev_forking.jsonl" --engine native --scorer reference --out eval
