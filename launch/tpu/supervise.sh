#!/usr/bin/env bash
# Brings a run to its end: asks for the TPU, sets it up, starts training, watches it, and does what
# is needed again when the TPU is taken away or training was told to stop.
#
#   supervise.sh --name=NAME --zone=ZONE --type=TYPE --config=FILE --workdir=gs://BUCKET/DIR
#                [--project=P] [--version=V] [--tier=spot] [--commit=C] [--repo=URL] [--retries=3]
#                [--poll=60] [--dry_run] [--config.KEY=VALUE ...] [-- FURTHER FLAGS OF gcloud create]
#
#   --retries  how often training that failed is started again; what ran for 60 looks, longer than
#              from one checkpoint to the next, did well, and counting begins anew
#   --poll     seconds between two looks; waits grow from that where something goes wrong
#
# What training's status means: 0 done; 75 told to stop, and has saved: it is resumed; 2 the config
# or command line is wrong: ends; others: failed, is tried again --retries times, from the newest
# checkpoint. Ends with 0 when the run is done; the TPU stays (delete.sh). Ctrl-C leaves training
# alone, and the same command watches again. To stop a run, end this first, then stop.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

here=$(dirname "${BASH_SOURCE[0]}")
parse "name! zone! type! config! workdir! project version tier commit repo retries poll" "" "$@"
retries=$(number retries 3)
poll=$(number poll 60)
where
need_gcloud

given() { # NAMES: the flags among them that were given, as words of GIVEN
  local name
  GIVEN=()
  for name in "$@"; do
    [[ -z ${FLAGS[$name]:-} ]] || GIVEN+=("--$name=${FLAGS[$name]}")
  done
}

step() { # SCRIPT [FLAGS]: one of the other scripts
  case $1 in
    create) given name zone project type version tier ;;
    setup) given name zone project type commit repo ;;
    run) given name zone project config workdir && GIVEN+=("${CONFIG_FLAGS[@]}") ;;
    *) given name zone project ;;
  esac
  local flags=("${GIVEN[@]}" "${@:2}")
  [[ $1 != create ]] || flags+=(-- "${REST[@]}")
  "$here/$1.sh" "${flags[@]}"
}

check_config() { # the file is in the commit that workers get, unless that is in --repo alone
  local commit config
  [[ -z $(flag repo) || -z $(flag commit) ]] || return 0
  config=$(flag config) # FILE or FILE:ARGUMENT
  config=${config%%:*}
  commit=$(git -C "$ROOT" rev-parse --verify --quiet "$(flag commit HEAD)^{commit}") || return 0
  [[ $config == /* ]] || git -C "$ROOT" cat-file -e "$commit:$config" 2> /dev/null ||
    fail "--config=$config: there is no such file in commit ${commit::12}, which workers get" 2
}

ask="if [ -e $WORKER_SH ]; then bash $WORKER_SH state; else echo \$(hostname) none; fi"

for script in create setup run; do # a wrong flag is found before anything is paid for
  step "$script" --dry_run > /dev/null
done
check_config
if dry_run; then
  for script in create setup run; do say "$script.sh" && step "$script" --dry_run; done
  say "then, every $poll s, is it there, and does training run?"
  execute gcloud compute tpus queued-resources describe "$(flag name)" "${WHERE[@]}" '--format=value(state.state)'
  execute gcloud compute tpus tpu-vm describe "$(flag name)" "${WHERE[@]}" '--format=value(state)'
  on_workers all "$ask"
  say "where the TPU was taken away, this, and all of the above again:"
  step delete --dry_run
  exit
fi

tell() { say "$(date +%T) $*"; }

wait_longer() { # what was tried did not work: wait, each time twice as long, up to 16 polls
  sleep "$delay"
  delay=$((delay * 2 > poll * 16 ? poll * 16 : delay * 2))
}

attempt() { # SCRIPTS in order; if one fails, the next look at the state tells what to do
  local script
  for script in "$@"; do
    tell "$script.sh"
    step "$script" || {
      tell "$script.sh did not succeed"
      wait_longer
      return
    }
  done
}

show_end() { # LINES of "HOST exit N": what the first worker that failed said last
  local bad worker=0
  bad=$(grep -Ev ' (running|exit (0|75))$' <<< "$1" | head -n 1)
  [[ ! $bad =~ -w-([0-9]+)\  ]] || worker=${BASH_REMATCH[1]}
  tell "the last lines of worker $worker:"
  step logs --nofollow --lines=40 "--worker=$worker" || true
}

failed() { # LINES: training ended on all workers, not everywhere with 0 or 75
  sleep "$poll" # a TPU that is being taken away says so a little later
  if [[ $(state || true) != ACTIVE ]]; then return; fi
  show_end "$1"
  ! grep -Eq ' exit 2$' <<< "$1" || fail "training refuses its flags or its config" 2
  ((failures < retries)) || fail "training failed $((failures + 1)) times; --retries=$retries"
  failures=$((failures + 1))
  steady=0
  tell "training failed; try $failures of $retries"
  attempt run
}

watch() { # the TPU is there: what does training do?
  local lines
  if ! lines=$(on_workers all "$ask"); then
    tell "not all workers answer"
    wait_longer
    return
  fi
  lines=$(grep -E '^[^ ]+ (running|exit [0-9]+|lost|none)$' <<< "$lines" || true)
  if [[ -z $lines ]] || grep -q ' none$' <<< "$lines"; then
    attempt setup run
  elif grep -q ' running$' <<< "$lines"; then
    delay=$poll
    if grep -Evq ' running$' <<< "$lines"; then
      uneven=$((uneven + 1))
      ((uneven < 10)) || { # the others wait in vain for those that ended
        tell "some workers ended, others did not: stopping them"
        step stop || true
      }
    else
      uneven=0
      steady=$((steady + 1))
      ((steady < 60)) || failures=0
    fi
    sleep "$poll"
  elif ! grep -Evq ' exit 0$' <<< "$lines"; then
    tell "the run is done; its TPU stays until delete.sh"
    exit 0
  elif ! grep -Evq ' exit (0|75)$' <<< "$lines"; then
    tell "training was told to stop, and has saved: it goes on"
    attempt run
  else
    failed "$lines"
  fi
}

delay=$poll
failures=0
uneven=0
steady=0 # looks at training that ran, since it failed last
before=
while true; do
  now=$(state) || now=UNKNOWN
  [[ $now == "$before" ]] || tell "$now"
  before=$now
  case $now in
    ACTIVE) watch ;;
    SUSPENDED | FAILED | NODE_GONE | PREEMPTED | TERMINATED | STOPPED) attempt delete create setup run ;;
    ABSENT | ACCEPTED | CREATING | PROVISIONING | WAITING_FOR_RESOURCES) attempt create setup run ;;
    *) wait_longer ;; # on its way to another state, or gcloud does not answer
  esac
done
