#!/usr/bin/env bash
# What the other scripts run on each TPU machine, in the checkout that setup.sh put there.
#
#   worker.sh install        makes .venv and installs this checkout
#   worker.sh check DEVICES  jax sees so many devices, over all workers
#   worker.sh start FLAGS    starts launch/train.py with FLAGS, unless training runs
#   worker.sh state          one line: HOST running | exit STATUS | lost | none
#   worker.sh idle           fails where training runs
#   worker.sh stop SECONDS   tells training to save and end, again and again; kills it after SECONDS
#   worker.sh tail LINES, worker.sh follow LINES
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HOST=$(hostname)
PYTHON=.venv/bin/python
LOG=runs/train.log
PID=runs/train.pid       # of the process that trains
STATUS=runs/train.status # its exit status, once it has ended
LOCK=runs/train.lock     # held while it runs: it is free after a crash or a reboot, too
CHECK_SECONDS=600        # for jax to find all workers
mkdir -p runs

fail() {
  echo "$HOST: $1" >&2
  exit "${2:-1}"
}

running() {
  local status=0
  flock --shared --nonblock --conflict-exit-code 75 "$LOCK" true || status=$?
  ((status == 75))
}

install() {
  # Images of TPU machines bring a Python older than 3.11, without venv; uv brings its own.
  if [[ ! -x $PYTHON ]]; then
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --seed --python 3.12 .venv
  fi
  "$PYTHON" -m pip install --quiet -r requirements.txt
  "$PYTHON" -m pip install --quiet -e '.[tpu,gcs]' -c requirements.txt
  echo "$HOST: installed"
}

check() { # all workers at once: each one waits for the others
  local said status=0
  said=$(timeout "$CHECK_SECONDS" "$PYTHON" -c '
import jax
print(jax.device_count(), jax.local_device_count(), jax.devices()[0].device_kind)
' 2>&1) || status=$?
  ((status != 124)) || fail "OFF: waited $CHECK_SECONDS s for the other workers, in vain"
  ((status == 0)) || fail "OFF: ${said:-no output} (status $status)"
  said=${said##*$'\n'}
  [[ ${said%% *} == "$1" ]] || fail "OFF: $1 devices expected, (all, here, kind) = $said"
  echo "$HOST: ok, (all, here, kind) = $said"
}

start() {
  local tries
  running && fail "training runs already: stop.sh ends it, logs.sh shows it"
  [[ -x $PYTHON ]] || fail "there is no .venv: setup.sh makes it"
  rm -f "$PID" "$STATUS"
  printf '== %s %s: %s\n' "$(date -u +%FT%TZ)" "$HOST" "$*" >> "$LOG"
  # The lock may be held for a moment by someone who asks whether training runs.
  setsid flock --timeout 10 "$LOCK" bash launch/tpu/worker.sh _train "$@" >> "$LOG" 2>&1 < /dev/null &
  for ((tries = 0; tries < 100; tries++)); do
    [[ -e $PID ]] && break
    sleep 0.1
  done
  [[ -e $PID ]] || fail "training does not start: see $PWD/$LOG"
  echo "$HOST: started"
}

_train() { # what start leaves behind: waits for training and writes down how it ended
  local status=0
  trap : TERM INT HUP # a machine that goes down tells all processes; this one is to see the end
  "$PYTHON" launch/train.py "$@" &
  child=$!
  echo "$child" > "$PID.new"
  mv "$PID.new" "$PID"
  wait "$child" || status=$?
  while kill -0 "$child" 2> /dev/null; do # a signal ended the waiting, not training
    status=0
    wait "$child" || status=$?
  done
  printf '== %s %s: status %s\n' "$(date -u +%FT%TZ)" "$HOST" "$status"
  echo "$status" > "$STATUS.new"
  mv "$STATUS.new" "$STATUS"
}

state() {
  if running; then
    echo "$HOST running"
  elif [[ -e $STATUS ]]; then
    echo "$HOST exit $(< "$STATUS")"
  elif [[ -e $PID ]]; then
    echo "$HOST lost"
  else
    echo "$HOST none"
  fi
}

idle() {
  ! running || fail "training runs already: stop.sh ends it, logs.sh shows it"
}

stop() {
  local waited
  for ((waited = 0; waited < $1; waited++)); do
    running || break
    ((waited % 3)) || kill -TERM "$(< "$PID")" 2> /dev/null || true
    sleep 1
  done
  if running; then
    kill -KILL "$(< "$PID")" 2> /dev/null || true
    fail "training did not end within $1 s and was killed"
  fi
  state
}

case ${1:-} in
  install | check | start | _train | state | idle | stop) "$@" ;;
  tail) tail -n "$2" "$LOG" | sed -u "s/^/$HOST: /" ;;
  follow) tail -n "$2" -F "$LOG" | sed -u "s/^/$HOST: /" ;;
  *) fail "what is '${1:-}'? install, check, start, state, idle, stop, tail, follow" 2 ;;
esac
