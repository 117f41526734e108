#!/usr/bin/env bash
# Both stages on the embedded model, from data to adapters and their table (runs/README.md). Every step goes on
# where it was cut off: kill it at any point and start it again.
#
#     runs/smollm2_two_stage.sh ANSWERS.jsonl EVAL.jsonl
#
# ANSWERS: {id, prompt, response, source, licence} a line. EVAL: AlpacaEval's form, {index, instruction, outputs}.
# On a GPU: DEVICE=cuda SEQS=96 BATCH_TOKENS=4096, and larger budgets. On a CPU the native engine samples, with the weights and
# positions that ship, so that stage 2 learns with what they do to an answer. LABELS: {id, label} a line, for pasta eval.
set -euo pipefail
answers=$(realpath "$1") eval=$(realpath "$2")
here=$(realpath "$(dirname "$0")")
pasta=$(realpath "${PASTA:-$here/../.venv/bin/pasta}")
python=$(dirname "$pasta")/python
device=${DEVICE:-cpu} seqs=${SEQS:-64} batch_tokens=${BATCH_TOKENS:-2048} length=${LENGTH:-smaller}
if [ "$device" = cpu ]; then engine=${ENGINE:-native}; else engine=${ENGINE:-transformers}; fi
plain=${PLAIN:-0.45} cut=${CUT:-0} end_weight=${END_WEIGHT:-1}
arm_tokens=${ARM_TOKENS:-200000}
stage1_tokens=${STAGE1_TOKENS:-600000} unlearn_tokens=${UNLEARN_TOKENS:-100000}
own_prompts=${OWN_PROMPTS:-1800} own_epochs=${OWN_EPOCHS:-2} n=${N:-10} round_prompts=${ROUND_PROMPTS:-300}
after_n=${AFTER_N:-2} lambdas=${LAMBDAS:-"1 2 4 inf"} rounds=${ROUNDS:-2}
mkdir -p "${OUT:-$here/out/two_stage}" && cd "${OUT:-$here/out/two_stage}"

source "$here/steps.sh"
train() { # train KIND OUT ARGUMENTS...
  local kind=$1 out=$2; shift 2
  [ -s "$out/adapter/README.md" ] || "$pasta" train "$kind" "$@" --out "$out" --device "$device"
}
sample() { "$pasta" sample "$@" --engine "$engine" --max-num-seqs "$seqs" --device "$device"; }

# 1. prompts: of our own making, and those of rows under Apache-2.0; the model's own answers to them
whole prompts_own.jsonl "$python" "$here/prompts.py" "$own_prompts"
whole prompts_licensed.jsonl "$python" "$here/rows.py" "$answers" --licensed Apache-2.0
whole prompts.jsonl cat prompts_own.jsonl prompts_licensed.jsonl
sample prompts.jsonl own_answers.jsonl --adapter none --sequential \
  --temperature 0.7 --top-p 0.95 --repetition-penalty 1.15 --max-tokens 448 --seed 2
"$pasta" annotate own_answers.jsonl own.jsonl --max-repetition 0.1
"$pasta" annotate "$answers" given.jsonl

# 2. whose responses; whose annotation (APAR's: by form alone); which positions (arm_given: the default mix). Every
# twentieth given answer is held out of the arms: what they make of those stands in positions.md
whole held.jsonl awk 'NR % 20 == 0' given.jsonl
whole arms.jsonl awk 'NR % 20' given.jsonl
train sft arm_own own.jsonl --token-budget "$arm_tokens" --seed 5
train sft arm_given arms.jsonl --token-budget "$arm_tokens" --seed 5
"$pasta" annotate "$answers" apar_all.jsonl --annotator apar
whole apar.jsonl awk 'NR % 20' apar_all.jsonl
train sft arm_apar apar.jsonl --token-budget "$arm_tokens" --seed 5
for policy in promised overlap serial; do
  train sft "arm_$policy" arms.jsonl --token-budget "$arm_tokens" --seed 5 --positions "$policy"
done
whole positions.md "$python" "$here/positions.py" held.jsonl mix=arm_given/adapter:off mix=arm_given/adapter:promised \
  mix=arm_given/adapter:overlap mix=arm_given/adapter:serial promised=arm_promised/adapter:promised \
  overlap=arm_overlap/adapter:overlap serial=arm_serial/adapter:serial

# 3. stage 1 on the given answers, the baseline on the same without tags, and an adapter that owes nothing to
# anyone's terms; each then unlearns what its own greedy answers repeat until they are cut off, and so do APAR's arm and
# ours of the same budget
whole prompts_loops.jsonl "$python" "$here/rows.py" "$answers" --draw 160 --seed 77
whole prompts_loops_own.jsonl "$python" "$here/rows.py" prompts.jsonl --draw 160 --seed 77
unlearn() { # unlearn NAME DATA PROMPTS FORKING FIRST ARGUMENTS...
  local name=$1 data=$2 prompts=$3 forking=$4 first=$5; shift 5
  sample "$prompts" "loops_$name.jsonl" --adapter "$first/adapter" --max-tokens 384 --sequential
  [ "$forking" = no ] || sample "$prompts" "loops_$name.jsonl" --adapter "$first/adapter" --max-tokens 384
  train sft "$name" "$data" --start "$first/adapter" --repeats "loops_$name.jsonl" \
    --token-budget "$unlearn_tokens" --learning-rate 2e-4 --row-learning-rate 1e-3 --seed 6 "$@"
}
finetune() { # finetune NAME DATA PROMPTS FORKING ARGUMENTS...
  local name=$1 data=$2 prompts=$3 forking=$4; shift 4
  train sft "${name}_first" "$data" --token-budget "$stage1_tokens" --batch-tokens "$batch_tokens" --seed 5 "$@"
  unlearn "$name" "$data" "$prompts" "$forking" "${name}_first" "$@"
}
finetune baseline given.jsonl prompts_loops.jsonl no --plain "$plain" --untagged
finetune stage1 given.jsonl prompts_loops.jsonl yes --plain "$plain" --cut "$cut" --end-weight "$end_weight"
finetune stage1_own own.jsonl prompts_loops_own.jsonl yes --epochs "$own_epochs"
unlearn pasta_small arms.jsonl prompts_loops.jsonl no arm_given
unlearn apar_small apar.jsonl prompts_loops.jsonl no arm_apar

# 4. stage 2, round after round: sample N answers to each of some new prompts, score, prefer best to worst. The given
# answers say which prompts ask for a list
whole prompts_rounds.jsonl "$python" "$here/rows.py" "$answers" --draw "$((rounds * round_prompts))" --seed 9
draw() { # draw ADAPTER N SEED SAMPLES: answers to the round's prompts, scored
  sample "prompts_round$round.jsonl" "$4.jsonl" --adapter "$1/adapter" --n "$2" --temperature 0.8 --top-p 0.95 \
    --max-tokens 512 --seed "$3"
  "$pasta" score "$4.jsonl" "$4.pmi.jsonl" --baseline "baseline_round$round.jsonl" --references "$answers" \
    --adapter baseline/adapter --device "$device" ${sigma:+--sigma "$sigma"} > "$4.pmi.json"
}
sigma=
for ((round = 1; round <= rounds; round++)); do
  whole "prompts_round$round.jsonl" sed -n "$(((round - 1) * round_prompts + 1)),$((round * round_prompts))p" prompts_rounds.jsonl
  sample "prompts_round$round.jsonl" "baseline_round$round.jsonl" --adapter baseline/adapter --sequential --max-tokens 512
  for lambda in $lambdas; do
    start=stage1
    [ "$round" = 1 ] || start="lambda${lambda}_round$((round - 1))"
    draw "$start" "$n" 3 "samples_$start"
    sigma=${sigma:-$("$python" -c 'import json,sys; print(json.load(open(sys.argv[1]))["sigma"])' "samples_$start.pmi.json")}
    train prefer "lambda${lambda}_round$round" "samples_$start.pmi.jsonl" --start "$start/adapter" \
      --lambda "$lambda" --length "$length" --sigma "$sigma"
  done
done

# ... and what the last round's adapters answer to the same prompts
round=$rounds
for lambda in $lambdas; do
  draw "lambda${lambda}_round$rounds" "$after_n" 4 "samples_lambda${lambda}_round$rounds"
done

# 5. the table: greedy answers to the evaluation's prompts
systems=()
for adapter in arm_own arm_given arm_promised apar_small pasta_small stage1_own stage1 lambda*_round*; do
  [ ! -d "$adapter/adapter" ] || systems+=("$adapter=$adapter/adapter")
done
# `serial` wants a server; but for what follows a sync, `overlap` is the same
systems+=("arm_overlap=arm_overlap/adapter:overlap" "arm_serial=arm_serial/adapter:overlap")
"$pasta" eval "${systems[@]}" --prompts "$eval" --baseline baseline/adapter --scorer pmi --scorer reference \
  --sigma "pmi=$sigma" --against stage1 --requests "$seqs" --no-matched --max-tokens 768 --public --device "$device" \
  --length "$length" ${LABELS:+--labels "$LABELS"} --out eval
