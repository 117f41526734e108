#!/usr/bin/env bash
# The fifth run on the embedded model, on a CPU, from the adapter of the second: the decision to fork, from more labels and
# with an anchor (runs/README.md). Every step goes on where it was cut off: kill it at any point and start it again.
#
#     runs/smollm2_fifth_run.sh ANSWERS.jsonl EVAL.jsonl
#
# ANSWERS: {id, prompt, response, source, licence} a line. EVAL: AlpacaEval's form, {index, instruction, outputs}.
# START: the adapter to start from (default: the second run's, out of this repository's history).
set -euo pipefail
source "$(dirname "$(realpath "$0")")/steps.sh"
after_second fifth_run "$1" "$2"
prompts() { "$python" "$here/labelled_prompts.py" "$answers" labels.jsonl --only "$1"; }
sample() { warm "$@" --adapter "$start"; }

# 1. what it answers; of most prompts for one thread only the beginning
whole labels.jsonl cat "$marks/rounds_forking.jsonl" "$marks/third_run_forking.jsonl" "$marks/fifth_run_forking.jsonl"
whole one.jsonl prompts one
whole should.jsonl prompts should
whole may.jsonl prompts may
whole one_whole.jsonl sed -n 1,500p one.jsonl
whole one_begin.jsonl sed -n 501,1800p one.jsonl
whole may_some.jsonl sed -n 1,250p may.jsonl
sample one_whole.jsonl one_answers.jsonl --sequential --max-tokens 512 --seed 41
sample should.jsonl should_answers.jsonl --max-tokens 512 --seed 42
sample one_begin.jsonl one_beginnings.jsonl --sequential --max-tokens 64 --seed 43
sample may_some.jsonl may_answers.jsonl --max-tokens 512 --seed 44
whole answers.jsonl joined one_answers.jsonl should_answers.jsonl one_beginnings.jsonl
whole anchors.jsonl "$python" "$here/anchors.py" labels.jsonl should_answers.jsonl may_answers.jsonl one_answers.jsonl --one 300

# 2. the decision, beside what holds the rest
[ -s fork/adapter/README.md ] || "$pasta" train fork answers.jsonl --labels labels.jsonl --anchors anchors.jsonl --start "$start" \
  --window 160 --fork-weight 4 --epochs 1 --save-steps 50 --out fork

# 3. greedy answers to the evaluation's prompts; those of what it starts from in one thread, too
"$pasta" eval "second=$start" "second-off=$start:off" fork=fork/adapter --prompts "$eval" --baseline "$root/adapters/baseline" \
  --requests "$seqs" --no-matched --max-tokens 768 --public --length matched \
  --labels "$marks/alpaca_eval_dev_forking.jsonl" --engine native --scorer reference --out eval
