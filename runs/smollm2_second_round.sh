#!/usr/bin/env bash
# The second run of both stages on the embedded model, on a CPU, from the adapters of the first (runs/README.md). Every step
# goes on where it was cut off: kill it at any point and start it again.
#
#     runs/smollm2_second_round.sh ANSWERS.jsonl EVAL.jsonl
#
# ANSWERS: {id, prompt, response, source, licence} a line. EVAL: AlpacaEval's form, {index, instruction, outputs}.
# The native engine samples, with the weights and positions that ship: what they do to an answer is part of what is learnt.
set -euo pipefail
answers=$(realpath "$1") eval=$(realpath "$2")
here=$(realpath "$(dirname "$0")")
pasta=${PASTA:-$(realpath "$here/../.venv/bin")/pasta} python=$(dirname "$(realpath "$here/../.venv/bin/pasta")")/python
adapters=$here/../adapters marks=$here/marks sigma=28.5636
lambdas=${LAMBDAS:-2} rounds=${ROUNDS:-1} n=${N:-6} seqs=${SEQS:-24}
mkdir -p "${OUT:-$here/out/second_round}" && cd "${OUT:-$here/out/second_round}"

source "$here/steps.sh"
train() { # train KIND OUT ARGUMENTS...
  local kind=$1 out=$2; shift 2
  [ -s "$out/adapter/README.md" ] || "$pasta" train "$kind" "$@" --out "$out"
}

# 1. stage 1 goes on from the first run's, on the answers as they are annotated now; then lambda 2 of the first run with
# what that changed
"$pasta" annotate "$answers" given.jsonl
train sft stage1 given.jsonl --start "$adapters/stage1" --token-budget 150000 --plain 0.5 \
  --learning-rate 2e-4 --row-learning-rate 1e-3 --save-steps 10 --seed 11
[ -s carried/adapter_model.safetensors ] ||
  "$python" "$here/add_change.py" "$adapters/lambda2" "$adapters/stage1" stage1/adapter carried

# 2. rounds on prompts that were labelled by hand: half of them each. Six answers, of which three or four are scored
for ((round = 1; round <= rounds; round++)); do
  whole "prompts_round$round.jsonl" "$python" "$here/labelled_prompts.py" "$answers" "$marks/rounds_forking.jsonl" \
    --part "$round" --of 2 --one 90
  native "prompts_round$round.jsonl" "baseline_round$round.jsonl" --adapter "$adapters/baseline" --sequential --max-tokens 512
  for lambda in $lambdas; do
    start=carried
    [ "$round" = 1 ] || start="lambda${lambda}_round$((round - 1))/adapter"
    name=samples_round$round
    [ "$round" = 1 ] || name=samples_lambda${lambda}_round$round
    warm "prompts_round$round.jsonl" "$name.jsonl" --adapter "$start" --n "$n" \
      --max-tokens 448 --seed 3
    whole "$name.fewer.jsonl" "$python" "$here/fewer.py" "$name.jsonl" "$marks/rounds_forking.jsonl"
    "$pasta" score "$name.fewer.jsonl" "$name.pmi.jsonl" --baseline "baseline_round$round.jsonl" --references "$answers" \
      --labels "$marks/rounds_forking.jsonl" --adapter "$adapters/baseline" --sigma "$sigma" --length smaller > "$name.pmi.json"
    train prefer "lambda${lambda}_round$round" "$name.pmi.jsonl" --start "$start" --lambda "$lambda" --length smaller \
      --sigma "$sigma" --true-lengths --save-steps 5
  done
done

# 3. greedy answers to the evaluation's prompts
systems=("lambda2=$adapters/lambda2")
for folder in lambda*_round*; do systems+=("$folder=$folder/adapter"); done
"$pasta" eval "${systems[@]}" --prompts "$eval" --baseline "$adapters/baseline" --scorer pmi --scorer reference \
  --sigma "pmi=$sigma" --against lambda2 --requests "$seqs" --no-matched --max-tokens 768 --public --length matched \
  --labels "$marks/alpaca_eval_dev_forking.jsonl" --engine native --out eval
