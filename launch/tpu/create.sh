#!/usr/bin/env bash
# Asks for a TPU (a queued resource with one slice) and waits until it is ACTIVE.
#
#   create.sh --name=NAME --zone=ZONE --type=TYPE [--project=P] [--version=V] [--tier=T] [--dry_run]
#             [-- FURTHER FLAGS OF gcloud]
#
#   --type     v4-256, v5p-256 (counted in TensorCores); v5litepod-256, v6e-64 (in chips)
#   --version  software of the machines; default: the one for the type
#   --tier     on-demand (default) | spot (cheaper, may be taken away) | reserved
#   --poll     seconds between two looks at its state; default 30
#
# Run again, it says what is there, and waits. Ctrl-C ends the waiting, not the request.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name! zone! type! project version tier poll" "" "$@"
chips "$(flag type)" > /dev/null
poll=$(number poll 30)
name=$(flag name)
version=$(flag version "$(runtime "$(flag type)")")
where
create=(gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${WHERE[@]}"
  "--accelerator-type=$(flag type)" "--runtime-version=$version")
case $(flag tier on-demand) in
  on-demand) ;;
  spot) create+=(--spot) ;;
  reserved) create+=(--reserved) ;;
  *) bad_flags "--tier=$(flag tier) is none of on-demand, spot, reserved" ;;
esac
create+=("${REST[@]}")
need_gcloud

if dry_run; then
  execute "${create[@]}"
  say "until it says ACTIVE, every $poll s:"
  execute gcloud compute tpus queued-resources describe "$name" "${WHERE[@]}" '--format=value(state.state)'
  exit
fi

now=$(state)
if [[ $now == ABSENT ]]; then
  "${create[@]}"
  now=$(state)
else
  say "$name is there already: $now"
fi
before=
while true; do
  [[ $now == "$before" ]] || say "$(date +%T) $now"
  case $now in
    ACTIVE) break ;;
    ABSENT | FAILED | SUSPEND* | DELETING | NODE_GONE | PREEMPTED | TERMINATED | STOP*)
      fail "$name is $now and does not come back: delete.sh --name=$name --zone=$(flag zone) first"
      ;;
  esac
  before=$now
  sleep "$poll"
  now=$(state)
done
