#!/usr/bin/env bash
# Shows what training says, and goes on until Ctrl-C, which leaves training alone.
#
#   logs.sh --name=NAME --zone=ZONE [--worker=0] [--lines=50] [--nofollow] [--project=P] [--dry_run]
#
#   --worker    0 (default), another number, or all; each line begins with its worker
#   --nofollow  shows the last lines and ends
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name! zone! worker lines project" "nofollow" "$@"
lines=$(number lines 50)
[[ $(flag worker 0) =~ ^([0-9]+|all)$ ]] || bad_flags "--worker=$(flag worker) is a number or all"
where
need_gcloud
how=follow
[[ $(flag nofollow) != true ]] || how="tail"
on_workers "$(flag worker 0)" "$(worker "$how" "$lines")"
