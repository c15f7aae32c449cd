#!/usr/bin/env bash
# Starts training on TPU slices of a GKE cluster: fills jobset.yaml and applies it with kubectl.
#
#   jobset.sh --name=NAME --slices=2 --type=v6e --topology=16x16 --image=IMAGE --config=FILE
#             --workdir=gs://BUCKET/DIR [--chips_per_node=4] [--retries=3] [--grace=900] [--spot]
#             [--namespace=default] [--service_account=default] [--dry_run] [--config.KEY=VALUE ...]
#
#   --type      v4, v5e, v5p, v6e or tpu7x
#   --topology  of one slice, as of its node pool: 4x4x8, 16x16
#   --retries   how often training that failed is started again in all; a machine that is lost
#               without notice is a failure, too, a preemption is none
#   --grace     seconds given to the checkpoint when a slice must go
#   --spot      runs on Spot nodes
#
# A dry run prints the manifest. Dockerfile makes the image, which has neither weights nor data: name
# those that the config has (--config.weights.llm, .tokenizer, .autoencoder, --config.data.path ...)
# by gs:// paths.
source "$(dirname "${BASH_SOURCE[0]}")/../tpu/common.sh"

names="name! slices! type! topology! image! config! workdir!"
parse "$names chips_per_node retries grace namespace service_account" "spot" "$@"

[[ $(flag name) =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  bad_flags "--name=$(flag name): up to 40 of a-z, 0-9 and -, beginning with a letter"
[[ $(flag workdir) == gs://?* ]] ||
  bad_flags "--workdir=$(flag workdir) must be gs://BUCKET/DIR: workers share it, and it outlives them"
for name in image namespace service_account; do
  [[ $(flag "$name" default) =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] || bad_flags "--$name=$(flag "$name") is no name"
done
slices=$(number slices 1)
retries=$(number retries 3)
grace=$(number grace 900)
((slices)) || bad_flags "--slices=0: at least one"

for word in "${CONFIG_FLAGS[@]}"; do # as training would, but after minutes of waiting for nodes
  [[ $word =~ ^--config\.mesh\.data=([0-9]+)$ ]] || continue
  ((BASH_REMATCH[1] && BASH_REMATCH[1] % slices == 0)) ||
    bad_flags "$word is no multiple of --slices=$slices: leave it out, and it is"
done

case $(flag type) in # the label of its nodes, and how many numbers a topology has
  v4) accelerator=tpu-v4-podslice axes=3 ;;
  v5e) accelerator=tpu-v5-lite-podslice axes=2 ;;
  v5p) accelerator=tpu-v5p-slice axes=3 ;;
  v6e) accelerator=tpu-v6e-slice axes=2 ;;
  tpu7x) accelerator=tpu7x axes=3 ;;
  *) bad_flags "--type=$(flag type) is none of v4, v5e, v5p, v6e, tpu7x" ;;
esac
[[ $(flag topology) =~ ^[1-9][0-9]*(x[1-9][0-9]*){$((axes - 1))}$ ]] ||
  bad_flags "--topology=$(flag topology): slices of $(flag type) have $axes axes, as in $( ((axes == 2)) && echo 4x4 || echo 2x2x4)"
chips=1
IFS=x read -ra sides <<< "$(flag topology)"
for side in "${sides[@]}"; do chips=$((chips * side)); done
per_node=$(number chips_per_node $((chips < 4 ? chips : 4)))
((per_node && chips % per_node == 0)) ||
  bad_flags "--chips_per_node=$per_node does not divide the $chips chips of $(flag topology)"

text() { # VALUE: as a string of JSON, which is YAML
  local value=${1//\\/\\\\}
  value=${value//\"/\\\"}
  [[ $value != *[[:cntrl:]]* ]] || bad_flags "$(quoted "$1") has control characters"
  printf '"%s"' "$value"
}

arguments=
for word in "--config=$(flag config)" "--workdir=$(flag workdir)" "${CONFIG_FLAGS[@]}"; do
  arguments+="${arguments:+, }$(text "$word")"
done

declare -A values=(
  [NAME]=$(flag name) [NAMESPACE]=$(flag namespace default) [RETRIES]=$retries
  [SLICES]=$slices [NODES]=$((chips / per_node)) [SERVICE_ACCOUNT]=$(flag service_account default)
  [GRACE]=$grace [ACCELERATOR]=$accelerator [TOPOLOGY]=$(flag topology) [CHIPS]=$per_node
  [IMAGE]=$(text "$(flag image)") [ARGS]="[$arguments]"
)
manifest=
while IFS= read -r line; do
  [[ $line != *"# only with --spot" || $(flag spot) == true ]] || continue
  if [[ $line =~ ^([^#@]*)@([A-Z_]+)@(.*)$ ]]; then # one a line, so that values are not searched
    line=${BASH_REMATCH[1]}${values[${BASH_REMATCH[2]}]}${BASH_REMATCH[3]}
  fi
  manifest+=$line$'\n'
done < "$(dirname "${BASH_SOURCE[0]}")/jobset.yaml"

if dry_run; then
  printf '%s' "$manifest"
else
  need kubectl "see https://kubernetes.io/docs/tasks/tools, or add --dry_run"
  kubectl apply --filename=- <<< "$manifest"
  say "its first worker: kubectl logs --follow --namespace=$(flag namespace default) --selector=jobset.sigs.k8s.io/jobset-name=$(flag name),jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
fi
