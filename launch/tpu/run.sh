#!/usr/bin/env bash
# Starts training on all workers, or goes on from the newest checkpoint in --workdir.
#
#   run.sh --name=NAME --zone=ZONE --config=FILE --workdir=gs://BUCKET/DIR [--project=P] [--dry_run]
#          [--config.KEY=VALUE ...]
#
# Training goes on when this command, or the connection, ends. It is not started where it runs.
# Its output is in ~/t2i_jax/runs/train.log of every worker (logs.sh).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name! zone! config! workdir! project" "" "$@"
[[ $(flag workdir) == gs://?* ]] ||
  bad_flags "--workdir=$(flag workdir) must be gs://BUCKET/DIR: workers share it, and it outlives them"
where
need_gcloud
# Each worker refuses alone; this way none starts where one still runs.
on_workers all "$(worker idle)"
flags=("--config=$(flag config)" "--workdir=$(flag workdir)" "${CONFIG_FLAGS[@]}")
on_workers all "$(worker start "${flags[@]}")"
