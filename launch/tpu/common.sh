# What the scripts of this folder and of launch/gke share; sourced, not run.
# shellcheck shell=bash disable=SC2034

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "bash $BASH_VERSION is too old: these scripts need 4.4 (on a Mac: brew install bash)" >&2
  exit 2
fi
set -euo pipefail
shopt -s inherit_errexit # what fails in $(...) fails the script

SCRIPT=${BASH_SOURCE[-1]}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
REMOTE=t2i_jax # the folder of the code on a worker, in the home of its user
WORKER_SH=$REMOTE/launch/tpu/worker.sh

declare -A FLAGS=() # what --name=value gave; switches are "true"
CONFIG_FLAGS=()     # --config.KEY=VALUE, for training
REST=()             # words after --

say() { # progress; a comment in a dry run, so that its output can be pasted into a shell
  if dry_run; then printf '# %s\n' "$*"; else printf '%s\n' "$*"; fi
}

fail() { # MESSAGE [STATUS]: one line, and the end
  printf '%s: %s\n' "$(basename "$SCRIPT")" "$1" >&2
  exit "${2:-1}"
}

usage() { # the comment at the head of the script
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$SCRIPT"
}

bad_flags() { fail "$1 (--help says more)" 2; }

# parse "NAMES" "SWITCHES" ARGUMENTS...: fills FLAGS, CONFIG_FLAGS and REST. A name that ends in !
# must be given. --dry_run is known to all; dashes in names count as underscores.
parse() {
  local names=" ${1//!/} " switches=" $2 dry_run " required=$1 argument name value
  shift 2
  while (($#)); do
    argument=$1
    shift
    case $argument in
      --help | -h) usage && exit 0 ;;
      --) REST=("$@") && break ;;
      --config.*=*) CONFIG_FLAGS+=("$argument") && continue ;;
      --config.*) bad_flags "$argument: write it as --config.KEY=VALUE" ;;
      --?*) ;;
      *) bad_flags "what is '$argument'? Flags look like --name=value" ;;
    esac
    name=${argument%%=*}
    name=${name#--}
    name=${name//-/_}
    if [[ $switches == *" $name "* ]]; then
      value=${argument#*=}
      [[ $argument == *=* ]] || value=true
      [[ $value == true || $value == false ]] || bad_flags "--$name is true or false, not '$value'"
    elif [[ $names == *" $name "* ]]; then
      if [[ $argument == *=* ]]; then
        value=${argument#*=}
      elif (($#)) && [[ $1 != --* ]]; then
        value=$1 && shift
      else
        bad_flags "--$name has no value: write --$name=VALUE"
      fi
      [[ -n $value ]] || bad_flags "--$name is empty: write --$name=VALUE"
    else
      bad_flags "what is --$name? Known are ${names# }${switches# }"
    fi
    FLAGS[$name]=$value
  done
  for name in $required; do
    [[ $name != *! || -n ${FLAGS[${name%!}]:-} ]] || bad_flags "--${name%!}=... is required"
  done
}

flag() { printf '%s' "${FLAGS[$1]:-${2:-}}"; } # NAME [DEFAULT]

dry_run() { [[ ${FLAGS[dry_run]:-false} == true ]]; }

number() { # NAME DEFAULT: the value of a flag that is a whole number
  local value
  value=$(flag "$1" "$2")
  [[ $value =~ ^[0-9]+$ ]] || bad_flags "--$1 is a whole number, not '$value'"
  printf '%s' "$value"
}

quoted() { # WORDS: as one would type them
  local word line=
  for word in "$@"; do
    if [[ -z $word || $word == *[!A-Za-z0-9_@%+=:,./~-]* ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

execute() { # runs a command, or prints it
  if dry_run; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

need() { # PROGRAM: which a dry run does not
  dry_run || command -v "$1" > /dev/null || fail "$1 is not installed; $2"
}

need_gcloud() {
  need gcloud "see https://cloud.google.com/sdk/docs/install, or add --dry_run"
}

where() { # the flags that place a resource, into the array WHERE
  WHERE=("--zone=$(flag zone)")
  [[ -z $(flag project) ]] || WHERE+=("--project=$(flag project)")
}

chips() { # TYPE: how many chips it has, each of them a device of jax
  local kind=${1%%-*} size=${1#*-} sizes="8 16 32 64" cores=2 most # the largest
  case $1 in # named by TensorCores, of which a chip has two; larger ones are whole cubes of 64 chips
    v4-*) most=4096 ;;
    v5p-*) most=12288 ;;
    v5litepod-* | v6e-*) sizes="1 4 8 16 32 64 128 256" cores=1 most=0 ;;
    v5e-*) bad_flags "--type=$1: did you mean v5litepod-$size, as Cloud TPU calls it?" ;;
    *) bad_flags "--type=$1 is no TPU type such as v4-256, v5p-256, v5litepod-256, v6e-64" ;;
  esac
  [[ $size =~ ^[1-9][0-9]{0,5}$ ]] || size=0
  if [[ " $sizes " != *" $size "* ]] && ((!size || size > most || size % 128)); then
    ((!most)) || sizes+=", and multiples of 128 up to $most"
    bad_flags "--type=$1: $kind has the sizes $sizes"
  fi
  printf %d $((size / cores))
}

runtime() { # TYPE: the software version of its machines
  case $1 in
    v4-*) printf tpu-ubuntu2204-base ;;
    v5litepod-*) printf v2-alpha-tpuv5-lite ;;
    v5p-*) printf v2-alpha-tpuv5 ;;
    v6e-*) printf v2-alpha-tpuv6e ;;
  esac
}

# The state of the queued resource --name: ABSENT, WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE,
# SUSPENDED, FAILED ...; while it is ACTIVE but its machines are not READY, theirs (PREEMPTED ...),
# or NODE_GONE where it has none any more: like a suspended one, it must be deleted.
state() {
  local state node
  state=$(describe queued-resources 'value(state.state)')
  if [[ $state == ACTIVE ]]; then
    node=$(describe tpu-vm 'value(state)')
    case $node in
      READY) ;;
      ABSENT) state=NODE_GONE ;;
      *) state=$node ;;
    esac
  fi
  printf '%s' "$state"
}

describe() { # KIND FORMAT: ABSENT if there is none
  local errors
  if { errors=$(gcloud compute tpus "$1" describe "$(flag name)" "${WHERE[@]}" "--format=$2" 2>&1 >&3); } 3>&1; then
    return
  fi
  [[ $errors == *NOT_FOUND* ]] || fail "gcloud does not tell the state of $(flag name): $errors"
  printf ABSENT
}

# Runs a shell command on workers (all, 0, 1-3): on all of them at once, however many there are.
# (`gcloud alpha` and `queued-resources ssh` go by batches; this command has no --batch-size.)
on_workers() { # WHICH COMMAND
  execute gcloud compute tpus tpu-vm ssh "$(flag name)" "${WHERE[@]}" "--worker=$1" "--command=$2"
}

worker() { # WORDS: the shell command by which worker.sh does that
  printf 'bash %s %s' "$WORKER_SH" "$(quoted "$@")"
}
