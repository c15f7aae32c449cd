#!/usr/bin/env bash
# Deletes a TPU: the queued resource and its machines, with all that is on their disks.
#
#   delete.sh --name=NAME --zone=ZONE [--project=P] [--dry_run]
#
# Checkpoints in a gs:// workdir stay. Training that runs is stopped without saving: stop.sh first.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name! zone! project" "" "$@"
where
need_gcloud
if ! dry_run && [[ $(describe queued-resources 'value(state.state)') == ABSENT ]]; then
  say "$(flag name) is not there"
  exit
fi
# --force takes the machines with it; --quiet asks nothing.
execute gcloud compute tpus queued-resources delete "$(flag name)" "${WHERE[@]}" --force --quiet
