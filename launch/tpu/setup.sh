#!/usr/bin/env bash
# Puts the code on all workers, at one commit, installs it, and checks that every chip answers.
#
#   setup.sh --name=NAME --zone=ZONE --type=TYPE [--project=P] [--commit=C] [--repo=URL] [--dry_run]
#
#   --commit  what is installed; default: HEAD of this checkout (uncommitted changes are left out)
#   --repo    workers clone it from there; default: this checkout is copied to them
#
# The code lies in ~/t2i_jax of every worker, its environment in ~/t2i_jax/.venv. Run again, it
# replaces the code; weights/, data/ and runs/ stay.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "name! zone! type! project commit repo" "" "$@"
devices=$(chips "$(flag type)")
where
need_gcloud
if [[ -n $(flag repo) && -n $(flag commit) ]]; then
  commit=$(flag commit) # need not be here
else
  wanted=$(flag commit HEAD)
  commit=$(git -C "$ROOT" rev-parse --verify --quiet "$wanted^{commit}") ||
    fail "--commit=$wanted: $ROOT has no such commit" 2
fi

# Nothing is replaced under training that runs. What commands make in the folder stays.
idle="if [ -e $WORKER_SH ]; then bash $WORKER_SH idle; fi"
clear="mkdir -p $REMOTE && find $REMOTE -mindepth 1 -maxdepth 1 ! -name .venv ! -name weights ! -name data ! -name runs -exec rm -rf {} +"
if [[ -n $(flag repo) ]]; then
  say "$(flag repo) at $commit, to all workers of $(flag name)"
  bring="rm -rf $REMOTE.clone && git clone --quiet $(quoted "$(flag repo)") $REMOTE.clone && git -C $REMOTE.clone checkout --quiet $(quoted "$commit")"
  on_workers all "$idle && $bring && $clear && cp -r $REMOTE.clone/. $REMOTE && rm -rf $REMOTE.clone"
else
  say "$ROOT at $commit, to all workers of $(flag name)"
  [[ -n $(flag commit) ]] || git -C "$ROOT" diff --quiet HEAD -- ||
    say "what is not committed in $ROOT stays here"
  archive=t2i_jax-$commit.tar.gz
  scratch=${TMPDIR:-/tmp}
  dry_run || scratch=$(mktemp -d)
  dry_run || trap 'rm -rf "$scratch"' EXIT
  execute git -C "$ROOT" archive --format=tar.gz "--output=$scratch/$archive" "$commit"
  execute gcloud compute tpus tpu-vm scp "$scratch/$archive" "$(flag name):" "${WHERE[@]}" --worker=all
  on_workers all "$idle && $clear && tar -xzf $archive -C $REMOTE && rm $archive"
fi
on_workers all "$(worker install)"
on_workers all "$(worker check "$devices")"
