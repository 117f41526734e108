#!/usr/bin/env bash
# What the adapter that ships does: results/shipped/. Every step goes on where it was cut off; some twenty minutes on 2
# cores. Its times are those of a machine that does nothing else.
#
#     runs/shipped.sh PROMPTS.jsonl      # AlpacaEval's form, {index, instruction, outputs}
#
# TIMED prompts are answered one at a time, for the clock, the others REQUESTS at once. Where llama-cpp-python is installed,
# AGAINST prompts are answered once more with weights of 4 bits, against llama.cpp's sequential decoding of the same text.
# LIMIT=3 tries it on three prompts, in out/.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/measure.sh"
begin shipped "$1"
against=${AGAINST:-50}
sha=$("$python" -c 'from pastalm.models import contents; print(contents.of_adapter("smollm2-135m-instruct", "auto")["sha256"])')
out=$out/${sha:0:12} # another adapter, another folder
measure shipped=auto

if [ "$against" -gt 0 ] && "$python" -c 'import llama_cpp' 2> "$out/llama_cpp.log"; then
  [ -s "$out/q4_0.gguf" ] || "$pasta" export "$out/q4_0.gguf" --gguf Q4_0 --adapter auto
  "$python" "$root/benchmarks/answers.py" "$prompts" --native auto --against "$out/q4_0.gguf" --drafts off auto \
    --limit "$against" --out "$out/llama_cpp.jsonl" --summary "$results/llama_cpp.json"
fi
