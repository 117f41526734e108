# What the runs' scripts source; it is not run by itself.
whole() { # whole FILE COMMAND...: a file that is there only once it is whole
  local file=$1; shift
  [ -s "$file" ] || { "$@" > "$file.part" && mv "$file.part" "$file"; }
}
