# What frontier.sh and shipped.sh have in common. They source this file with their prompts; it is not run by itself.
#
#     begin NAME PROMPTS     # where things are; LIMIT, OUT, RESULTS, TIMED, REQUESTS and PASTA change it
#     measure SYSTEM...      # every system against Baseline-SFT: $out/answers, and $results
begin() {
  here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
  root=$(dirname "$here")
  prompts=$(realpath "$2")
  pasta=$(realpath "${PASTA:-$root/.venv/bin/pasta}")
  python=$(dirname "$pasta")/python
  out=${OUT:-$here/out/$1${LIMIT:+-$LIMIT}}
  results=${RESULTS:-$root/results/$1}
}

measure() {
  if [ -n "${LIMIT:-}" ]; then results=$out/report; fi
  mkdir -p "$out" "$results"
  "$pasta" eval "$@" --baseline "$root/adapters/baseline" --engine native --prompts "$prompts" \
    --requests "${REQUESTS:-64}" --timed "${TIMED:-50}" --scorer pmi --scorer reference --sigma pmi=28.5636 --length matched \
    --max-tokens 768 --labels "$here/marks/alpaca_eval_dev_forking.jsonl" --public ${LIMIT:+--limit "$LIMIT"} \
    --out "$out" --report "$results"
  rm "$results/index.html" # its pictures are beside it
}
