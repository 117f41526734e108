# What the runs' scripts source; it is not run by itself.
whole() { # whole FILE COMMAND...: a file that is there only once it is whole
  local file=$1; shift
  [ -s "$file" ] || { "$@" > "$file.part" && mv "$file.part" "$file"; }
}
joined() { cat "$1"; shift; for more; do tail -n +2 "$more"; done; } # without the lines that say what made the others
native() { "$pasta" sample "$@" --engine native --max-num-seqs "$seqs"; }
warm() { native "$@" --temperature 0.8 --top-p 0.95; }
drawn() { shuf --random-source=<(yes) -n "$2" "$1"; } # drawn FILE COUNT: the same lines each time
after_second() { # after_second NAME ANSWERS EVAL: where things are, for runs that start from the second run's adapter
  answers=$(realpath "$2") eval=$(realpath "$3")
  here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
  root=$(dirname "$here")
  pasta=$(realpath "${PASTA:-$root/.venv/bin/pasta}")
  python=$(dirname "$pasta")/python
  marks=$here/marks seqs=${SEQS:-32}
  mkdir -p "${OUT:-$here/out/$1}" && cd "${OUT:-$here/out/$1}"
  start=${START:-$PWD/second}
  earlier b3c32f2 pastalm/adapters/smollm2-135m-instruct "$start"
}
earlier() { # earlier COMMIT PATH FOLDER: an adapter out of this repository's history
  [ -s "$3/adapter_model.safetensors" ] && return
  mkdir -p "$3"
  git -C "$root" archive "$1:$2" | tar -x -C "$3"
}
