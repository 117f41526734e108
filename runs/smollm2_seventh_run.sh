#!/usr/bin/env bash
# The seventh run on the embedded model, on a CPU: stage 3 from the adapter of the sixth, at the prompts where it is wrong
# (runs/README.md). Every step goes on where it was cut off: kill it at any point and start it again.
#
#     runs/smollm2_seventh_run.sh ANSWERS.jsonl EVAL.jsonl
#
# ANSWERS: {id, prompt, response, source, licence} a line. EVAL: AlpacaEval's form, {index, instruction, outputs}.
# FIFTH: where the fifth run's script has worked (default: its own folder): its prompts and labels.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/steps.sh"
fifth=$(realpath "${FIFTH:-$(dirname "$0")/out/fifth_run}")
after_second seventh_run "$1" "$2"
labels=$fifth/labels.jsonl fork=$PWD/fork faster=$PWD/faster
earlier 7809d32 adapters/fork "$fork" # the fifth run's
earlier 7809d32 pastalm/adapters/smollm2-135m-instruct "$faster" # the sixth run's
rows() { drawn <(tail -n +2 "$1") "$2"; } # rows FILE COUNT: without the line that says what made them
wrong() { "$python" "$here/mistaken.py" "$labels" "$@"; }
good() { "$python" "$here/anchors.py" "$labels" "$@"; }
unseen() { # unseen FILE SEEN COUNT: what is not among those that the sixth run drew
  grep -vFf <(drawn "$fifth/$1" "$2" | grep -o '^{"id": "[^"]*"') "$fifth/$1" | sed -n "1,$3p"
}
decide() { # decide START OUT DECISIONS ANCHORS RATE
  [ -s "$2/adapter/README.md" ] || "$pasta" train fork "$3" --labels "$labels" --anchors "$4" --start "$1" --eager \
    --true-lengths --window 160 --fork-weight 4 --learning-rate "$5" --epochs 1 --save-steps 60 --out "$2"
}

# 1. where the sixth run's adapter forks and should not, one thread; where it should, forks that gain
native "$fifth/one.jsonl" one_begun.jsonl --adapter "$faster" --max-tokens 128
whole forked.jsonl wrong one_begun.jsonl --only one
warm forked.jsonl forked_answers.jsonl --adapter "$faster" --sequential --max-tokens 192 --seed 71
whole one_whole.jsonl drawn "$fifth/one.jsonl" 160
warm one_whole.jsonl one_answers.jsonl --adapter "$faster" --sequential --max-tokens 512 --seed 72
whole should.jsonl unseen should.jsonl 300 320
whole may.jsonl unseen may.jsonl 160 170
warm should.jsonl should_answers.jsonl --adapter "$faster" --n 3 --max-tokens 448 --seed 73
warm may.jsonl may_answers.jsonl --adapter "$faster" --n 3 --max-tokens 448 --seed 74
whole chosen.jsonl good should_answers.jsonl may_answers.jsonl one_answers.jsonl --gain 1.8 --one 100
whole anchors.jsonl good should_answers.jsonl may_answers.jsonl one_answers.jsonl --gain 2.2 --one 120
whole decisions.jsonl cat chosen.jsonl <(rows forked_answers.jsonl 880)
decide "$faster" corrected decisions.jsonl anchors.jsonl 3e-4

# 2. 0.3 of what the sixth run's round for speed changed, once more
[ -s corrected_faster/adapter_model.safetensors ] ||
  "$python" "$here/add_change.py" corrected/adapter "$fork" "$faster" corrected_faster --share 0.3

# 3. the same where that is still wrong; to prompts where it does not fork and should, the sixth run's adapter answers
whole several.jsonl cat "$fifth/should.jsonl" "$fifth/may.jsonl"
whole single.jsonl drawn "$fifth/one.jsonl" 1400
native several.jsonl several_begun.jsonl --adapter corrected/adapter --max-tokens 112
native single.jsonl single_begun.jsonl --adapter corrected/adapter --max-tokens 96
whole still_one.jsonl wrong several_begun.jsonl
whole still_forked.jsonl wrong single_begun.jsonl
warm still_forked.jsonl still_forked_answers.jsonl --adapter corrected/adapter --sequential --max-tokens 192 --seed 81
warm still_one.jsonl still_one_answers.jsonl --adapter "$faster" --n 2 --max-tokens 448 --seed 82
whole forks.jsonl good still_one_answers.jsonl --gain 1.5
whole more.jsonl cat forks.jsonl <(drawn <(grep '<promise' chosen.jsonl) 150) \
  <(rows still_forked_answers.jsonl 1000) <(rows forked_answers.jsonl 330) <(rows one_answers.jsonl 50)
whole fewer_anchors.jsonl cat <(head -n 1 anchors.jsonl) <(rows anchors.jsonl 220)
decide corrected_faster corrected_twice more.jsonl fewer_anchors.jsonl 2e-4

# 4. greedy answers to the evaluation's prompts
"$pasta" eval "faster=$faster" corrected=corrected/adapter corrected-faster=corrected_faster \
  corrected-twice=corrected_twice/adapter --prompts "$eval" --baseline "$root/adapters/baseline" --requests "$seqs" --no-matched \
  --max-tokens 768 --public --length matched --labels "$marks/alpaca_eval_dev_forking.jsonl" --engine native --scorer reference --out eval
