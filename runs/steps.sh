# What the runs' scripts source; it is not run by itself.
whole() { # whole FILE COMMAND...: a file that is there only once it is whole
  local file=$1; shift
  [ -s "$file" ] || { "$@" > "$file.part" && mv "$file.part" "$file"; }
}
second_adapter() { # second_adapter ROOT FOLDER: the second run's adapter, out of the last commit that has it, unless it is there
  [ -s "$2/adapter_model.safetensors" ] && return
  mkdir -p "$2"
  git -C "$1" archive b3c32f2 pastalm/adapters/smollm2-135m-instruct | tar -x -C "$2" --strip-components 3
}
