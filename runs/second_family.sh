#!/usr/bin/env bash
# The same pipeline on a model of another family: a small Qwen3 of random weights learns to write, then to fork
# (results/second_family/). Every step goes on where it was cut off; about an hour and a half on one core.
#
#     runs/second_family.sh [ANNOTATED.jsonl]     # default: own.jsonl.xz, 991 annotated answers under Apache-2.0
#
# Of every ten prompts one is kept for the evaluation, and never trained on.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
annotated=${1:+$(realpath "$1")}
pasta=$(realpath "${PASTA:-$here/../.venv/bin/pasta}")
python=$(dirname "$pasta")/python
base_epochs=${BASE_EPOCHS:-3} epochs=${EPOCHS:-2} tokens=${TOKENS:-10000000} batch_tokens=${BATCH_TOKENS:-1024}
hidden=${HIDDEN:-128} layers=${LAYERS:-3} vocabulary=${VOCABULARY:-2048} rank=${RANK:-16}
round_prompts=${ROUND_PROMPTS:-60} n=${N:-4} eval_prompts=${EVAL_PROMPTS:-50} timed=${TIMED:-10} max_tokens=${MAX_TOKENS:-320}
out=${OUT:-$here/out/second_family}
report=${REPORT:-$out/report}
mkdir -p "$out" && cd "$out"

source "$here/steps.sh"
train() { # train KIND OUT ARGUMENTS...
  local kind=$1 to=$2; shift 2
  [ -s "$to/adapter/README.md" ] || [ -s "$to/model/README.md" ] || "$pasta" train "$kind" "$@" --out "$to"
}
sample() { "$pasta" sample "$@" --model base/model --engine native --max-tokens "$max_tokens"; }

# 1. the rows; a model and a tokenizer of its own; the model learns to write on the answers without tags
if [ -n "$annotated" ]; then whole all.jsonl cat "$annotated"; else whole all.jsonl xzcat "$here/own.jsonl.xz"; fi
whole train.jsonl awk 'NR % 10' all.jsonl
whole held.jsonl awk 'NR % 10 == 0' all.jsonl
"$python" "$here/second_family.py" train.jsonl random --hidden "$hidden" --layers "$layers" --vocabulary "$vocabulary"
train sft base train.jsonl --model random --full --untagged --plain 0.6 --epochs "$base_epochs" --token-budget "$tokens" \
  --learning-rate 2e-3 --batch-tokens "$batch_tokens"

# 2. Baseline-SFT and stage 1 on the same rows
common=(--model base/model --token-budget "$tokens" --epochs "$epochs" --batch-tokens "$batch_tokens" --lora-rank "$rank")
train sft baseline train.jsonl "${common[@]}" --untagged --learning-rate 5e-4
train sft stage1 train.jsonl "${common[@]}" --learning-rate 2e-3 --row-learning-rate 1e-2

# 3. a round of stage 2: N answers of the native engine to each of some prompts, scored, best against worst
whole prompts.jsonl "$python" "$here/rows.py" train.jsonl --draw "$round_prompts" --seed 9
sample prompts.jsonl base_answers.jsonl --adapter baseline/adapter --sequential
sample prompts.jsonl samples.jsonl --adapter stage1/adapter --n "$n" --temperature 0.8 --top-p 0.95 --seed 3
"$pasta" score samples.jsonl scored.jsonl --baseline base_answers.jsonl --references all.jsonl --model base/model \
  --tokenizer base/model --adapter baseline/adapter --length smaller > scored.json
train prefer stage2 scored.jsonl --model base/model --start stage1/adapter --lambda 2 --length smaller

# 4. what came out: greedy answers to prompts that nobody was trained on, one at a time for the clock; every token replayed
whole prompts_held.jsonl "$python" "$here/rows.py" held.jsonl --draw "$eval_prompts" --seed 1
"$pasta" eval stage1=stage1/adapter stage2=stage2/adapter --model base/model --baseline baseline/adapter --engine native \
  --prompts prompts_held.jsonl --scorer pmi --length smaller --requests 32 --timed "$timed" --max-tokens "$max_tokens" \
  --out eval --report "$report"
whole exact.md "$python" "$here/../benchmarks/exact.py" prompts_held.jsonl --model base/model --adapter stage2/adapter \
  --dtypes float32 q8_0 --limit "$timed"
cp exact.md "$report/exact.md"
