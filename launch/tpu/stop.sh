#!/usr/bin/env bash
# Tells training on all workers to save and end, and waits until it has.
#
#   stop.sh --name=NAME --zone=ZONE [--wait=900] [--project=P] [--dry_run]
#
#   --wait  seconds given to the checkpoint; afterwards training is killed, and the status is 1
#
# The machines stay (delete.sh), and run.sh goes on from the checkpoint.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name! zone! wait project" "" "$@"
seconds=$(number wait 900)
where
need_gcloud
on_workers all "$(worker stop "$seconds")"
