#!/usr/bin/env bash
# The adapter that ships for the embedded model, from data to adapter: about an hour and a quarter on 2
# cores. Each step goes on where it was cut off.
#
#     runs/smollm2_stage1.sh ANSWERS.jsonl      # {id, prompt, response, source, licence} a line
set -euo pipefail
answers=$(realpath "$1")
pasta=$(realpath "${PASTA:-.venv/bin/pasta}")
mkdir -p "$(dirname "$0")/out" && cd "$(dirname "$0")/out"

# 1. mark the independent parts of the given answers
"$pasta" annotate "$answers" annotated.jsonl

# 2. stage 1 (PASTA section 5.2)
[ -d stage1/adapter ] || "$pasta" train sft annotated.jsonl --out stage1 --token-budget 600000 --seed 5

# 3. the model's own greedy answers, with forking and without, to 160 prompts drawn at random
[ -s prompts.jsonl ] || "$(dirname "$pasta")/python" - "$answers" > prompts.jsonl <<'PYTHON'
import json, random, sys
rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
random.Random(77).shuffle(rows)
rows = [row for row in rows if 12 < len(row["prompt"]) < 500]
for row in rows[:160]:
    print(json.dumps({"id": row["id"], "prompt": row["prompt"]}))
PYTHON
for mode in "" --sequential; do
  "$pasta" sample prompts.jsonl own.jsonl --adapter stage1/adapter --max-tokens 384 --engine transformers --max-num-seqs 64 $mode
done

# 4. go on, unlearning what those answers repeat until they are cut off
[ -d stage1b/adapter ] || "$pasta" train sft annotated.jsonl --out stage1b --start stage1/adapter \
  --repeats own.jsonl --token-budget 100000 --learning-rate 2e-4 --row-learning-rate 1e-3 --seed 6
