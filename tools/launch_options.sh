# Reads and checks the options of tools/launch_*, which source this file. They only ever evaluate,
# quote or pass on values that were checked here. Works with bash 3.2, that of macOS.
# shellcheck shell=bash

say() { printf '%s: %s\n' "$launcher" "$*" >&2; }
die() { # STATUS MESSAGE
  say "$2"
  exit "$1"
}
mistake() { die 2 "$*"; }

# check_line TEXT: exits with status 2 unless it is UTF-8 without line breaks and control characters,
# which YAML or a terminal would obey (among them U+0085, U+2028 and the byte-order mark).
check_line() {
  local LC_ALL=C others=$'\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9]|\xef\xbb\xbf|\xef\xbf[\xbe\xbf]'
  [[ ! $1 =~ [[:cntrl:]] && ! $1 =~ $others ]] &&
    iconv -f UTF-8 -t UTF-8 <<<"$1" >/dev/null 2>&1 ||
    mistake "$(printf '%q: must be UTF-8 without line breaks and control characters.' "$1")"
}

check() { # WHAT KIND VALUE: exits with status 2 unless the value is of that kind; names may be empty
  local LC_ALL=C must pattern empty=''
  case $2 in
    number) must='be a whole number' pattern='0|[1-9][0-9]{0,8}' empty=no ;;
    count) must='be a whole number, 1 or more' pattern='[1-9][0-9]{0,8}' empty=no ;;
    seconds) must='be a number of seconds' pattern='(0|[1-9][0-9]{0,8})([.][0-9]{1,3})?' empty=no ;;
    label)
      must='have only lower-case letters, digits and dashes, at most 63'
      pattern='[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?'
      ;;
    word)
      must='have only letters, digits and . _ : -, and begin with one of the first two'
      pattern='[A-Za-z0-9][A-Za-z0-9._:-]{0,252}'
      ;;
    image)
      must='be the name of an image, as in HOST/PATH:TAG'
      pattern='[A-Za-z0-9][A-Za-z0-9._:/@-]{0,255}' # macOS repeats at most 255 times
      ;;
    topology)
      must='look like 16x16 or 4x4x4'
      pattern='[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,3}'
      ;;
    mount)
      must='be gs://BUCKET or HOST:/SHARE'
      pattern='gs://[a-z0-9][a-z0-9._-]*/?|([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):/([^/].*)?'
      ;;
  esac
  # %q, because a terminal obeys control characters.
  [[ $3$empty == '' || $3 =~ ^($pattern)$ ]] || mistake "$(printf '%s=%q: must %s.' "$1" "$3" "$must")"
  check_line "$1=$3"
}

check_variable() { # exits with status 2 unless its argument is NAME=VALUE, whose value is any line
  local LC_ALL=C
  [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]{0,254}= ]] ||
    mistake "$(printf -- '--env=%q: must be NAME=VALUE; a name has only letters, digits and _.' "$1")"
  check_line "$1"
}

# read_options 'NAME:KIND …' ARGUMENTS…: sets the variable of each option. Kinds are those of `check`;
# "switch", which takes no value; "each", a line that may be given repeatedly, whose values become the
# array `each`; and "variable", NAME=VALUE, likewise for `variables`. What follows -- becomes `program`.
read_options() {
  local spec=" ${1//$'\n'/ } " option kind value flag
  shift
  each=() variables=() program=()
  while (($#)) && [[ $1 != -- ]]; do
    option=${1%%=*}
    option=${option#--}
    kind=${spec#*" $option:"}
    [[ $1 == --* && $option && $option != *[!a-z_]* && $kind != "$spec" ]] ||
      mistake "$(printf "unknown flag %q; the program's flags go after --." "$1")"
    kind=${kind%% *} value=${1#*=}
    if [[ $kind == switch ]]; then
      [[ $1 == "--$option" ]] || mistake "--$option takes no value."
      value=1
    else
      [[ $1 == *=* ]] || mistake "--$option needs a value: --$option=VALUE."
    fi
    case $kind in
      switch) ;;
      each) check_line "$1" && each+=("$value") ;;
      variable) check_variable "$value" && variables+=("$value") ;;
      *) check "--$option" "$kind" "$value" ;;
    esac
    if [[ $kind != each && $kind != variable ]]; then printf -v "$option" '%s' "$value"; fi
    shift
  done
  if (($#)); then shift; fi
  program=("$@")
  for flag in "$@"; do check_line "$flag"; done
}

# given NAME DEFAULT: prints the last value of the field config.NAME among the program's flags, which
# begin with one or two dashes and have the value behind = or in the next word.
given() {
  local flag value=$2 next=''
  for flag in ${program[@]+"${program[@]}"}; do
    if [[ $next ]]; then
      value=$flag next=''
    elif [[ $flag == "--config.$1="* || $flag == "-config.$1="* ]]; then
      value=${flag#*=}
    elif [[ $flag == "--config.$1" || $flag == "-config.$1" ]]; then
      next=1
    fi
  done
  printf '%s' "$value"
}

quoted() { # quotes its arguments as one line for a shell
  local line='' word one="'" quoted="'\\''"
  for word in "$@"; do
    case $word in *[!A-Za-z0-9_./:=,@%+-]* | '') word="'${word//$one/$quoted}'" ;; esac
    line+=" $word"
  done
  printf '%s' "${line# }"
}

need_program() { # exits with status 2 if nothing follows --
  ((${#program[@]})) ||
    mistake "the program's flags are missing: -- --config=configs/NAME.py --workdir=DIR."
}
