#!/usr/bin/env bash
# Trains on Cloud TPU slices from your own machine. Needs gcloud, logged in, and a bucket for the run.
#
#   export TPU_NAME=tarflow ZONE=us-west4-a TPU_TYPE=v5litepod-256        (or --name=, --zone=, --type=)
#   launch/tpu_pod.sh create             request the slice; `status` shows ACTIVE once it is granted
#   launch/tpu_pod.sh copy               copy the last commit to every worker
#   launch/tpu_pod.sh install            install Python 3.11, requirements.txt and jax[tpu] on every worker
#   launch/tpu_pod.sh run launch.train --config=configs/imagenet64_cond.py --workdir=gs://BUCKET/imagenet64_cond \
#     --config.data.source=packed:gs://BUCKET/DATA      what launch.prepare_data packed, copied there
#   launch/tpu_pod.sh logs               follow the log of the first worker
#   launch/tpu_pod.sh stop               save and stop; `run` with the same command continues
#   launch/tpu_pod.sh delete             give the slice back, which ends its costs
#
# Other options: --project=; --slices=2, in `create` and all later calls; for `create` --spot, and --runtime= unless the
# type is v5litepod, v5p or v6e; --dry_run prints the commands without running them. Options precede `run`'s command.

set -euo pipefail
cd "$(dirname "$0")/.."

TPU_NAME="${TPU_NAME:-}" ZONE="${ZONE:-}" PROJECT="${PROJECT:-}" TPU_TYPE="${TPU_TYPE:-}" RUNTIME="${RUNTIME:-}"
SLICES="${SLICES:-1}" SPOT="${SPOT:-}" DRY_RUN=""

fail() {
  echo "error: $*" >&2
  exit 1
}

call() { # runs a command, or prints it quoted for the shell
  if [[ -n $DRY_RUN ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

gcloud_tpus() {
  call gcloud compute tpus "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

nodes() {
  if [[ $SLICES -eq 1 ]]; then
    echo "$TPU_NAME"
  else
    seq -f "$TPU_NAME-%.0f" 0 $((SLICES - 1)) # as --node-prefix names them
  fi
}

on_all() { # runs a shell command on every worker, also when it fails on others
  local node code=0
  for node in $(nodes); do
    gcloud_tpus tpu-vm ssh "$node" --worker=all "--command=$1" || code=$?
  done
  return "$code"
}

create() {
  local options=("--node-id=$TPU_NAME")
  if [[ $SLICES -gt 1 ]]; then options=("--node-count=$SLICES" "--node-prefix=$TPU_NAME"); fi
  if [[ -n $SPOT ]]; then options+=(--spot); fi
  [[ -n $TPU_TYPE ]] || fail "no accelerator; expected --type=v5litepod-256 or the like"
  case $TPU_TYPE in
    v5litepod-*) RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" ;;
    v5p-*) RUNTIME="${RUNTIME:-v2-alpha-tpuv5}" ;;
    v6e-*) RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}" ;;
  esac
  [[ -n $RUNTIME ]] || fail "no runtime is known for $TPU_TYPE; expected --runtime="
  gcloud_tpus queued-resources create "$TPU_NAME" "--accelerator-type=$TPU_TYPE" "--runtime-version=$RUNTIME" \
    "${options[@]}"
}

copy() {
  local archive="${TMPDIR:-/tmp}/tarflow_jax.tar.gz" node
  call git archive --prefix=tarflow_jax/ "--output=$archive" HEAD
  for node in $(nodes); do
    gcloud_tpus tpu-vm scp "$archive" "$node:" --worker=all
  done
  on_all "rm -rf tarflow_jax && tar -xzf tarflow_jax.tar.gz"
}

install() { # the Python of the images is too old
  on_all "python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --clear --python 3.11 tarflow_venv &&\
 ~/.local/bin/uv pip install --python tarflow_venv --requirement tarflow_jax/requirements.txt 'jax[tpu]'"
}

run() {
  [[ $# -gt 0 ]] || fail "no command; expected: run launch.train --config=… --workdir=gs://…"
  local command
  command="$(printf ' %q' "$@")"
  # `kill -0` checks whether an earlier run is still alive.
  on_all "if { kill -0 \$(cat tarflow.pid); } 2>/dev/null; then echo 'error: a run goes on; stop it first' >&2; exit 1; fi;\
 cd tarflow_jax && { nohup ~/tarflow_venv/bin/python -m$command --distributed >> ~/tarflow.log 2>&1 < /dev/null &\
 echo \$! > ~/tarflow.pid; }"
}

[[ $# -gt 0 ]] || fail "no subcommand; expected create, status, copy, install, run, logs, stop or delete"
subcommand="$1"
shift
while [[ $# -gt 0 && $1 == --* ]]; do
  case $1 in
    --name=*) TPU_NAME="${1#*=}" ;;
    --zone=*) ZONE="${1#*=}" ;;
    --project=*) PROJECT="${1#*=}" ;;
    --type=*) TPU_TYPE="${1#*=}" ;;
    --runtime=*) RUNTIME="${1#*=}" ;;
    --slices=*) SLICES="${1#*=}" ;;
    --spot) SPOT=1 ;;
    --dry_run) DRY_RUN=1 ;;
    *) fail "unknown option $1; see the head of $0" ;;
  esac
  shift
done
[[ -n $TPU_NAME && -n $ZONE ]] || fail "no slice; expected --name= and --zone=, or TPU_NAME and ZONE"
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "--slices is $SLICES; expected a positive number"
[[ $# -eq 0 || $subcommand == run ]] || fail "unexpected argument $1"

case $subcommand in
  create | copy | install) "$subcommand" ;;
  run) run "$@" ;;
  status) gcloud_tpus queued-resources describe "$TPU_NAME" "--format=value(state.state)" ;;
  logs) gcloud_tpus tpu-vm ssh "$(nodes | head -n 1)" --worker=0 "--command=tail -n 50 -F tarflow.log" ;;
  stop) on_all "kill -TERM \$(cat tarflow.pid)" ;; # every worker: all save together
  delete) gcloud_tpus queued-resources delete "$TPU_NAME" --force --quiet ;;
  *) fail "unknown subcommand $subcommand; expected create, status, copy, install, run, logs, stop or delete" ;;
esac
