#!/usr/bin/env bash
# Makes this machine a sampler: a node of the learner's Ray cluster, for as long as this process lives. Ctrl-C, or
# `kill` of this process, ends it. When the head is gone, it waits for it to come again.
#
#   usage: scripts/ray_sampler.sh HEAD:PORT [flags of `ray start`]
#
#     HEAD:PORT   where scripts/ray_head.sh runs
#     RAY         in the environment: which `ray` to run
#
# The node offers the resource `sampler`, so that --vllm.resource sampler keeps engines to such machines, and all its
# CPUs and GPUs (or --num-gpus 2). --labels pool=h100 lets --vllm.label pool=h100 choose among them.
# It needs the token of ray_head.sh in ~/.ray/auth_token or in RAY_AUTH_TOKEN.
set -euo pipefail

head=${1:?usage: scripts/ray_sampler.sh HEAD:PORT [flags of ray start]}
ray=${RAY:-ray}

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
export RAY_USAGE_STATS_ENABLED=0

node=
trap 'trap - INT TERM; [ -z "$node" ] || { kill "$node" 2>/dev/null || true; wait "$node" || true; }; exit 143' INT TERM
while true; do
  "$ray" start --address="$head" --resources='{"sampler": 1}' --block "${@:2}" &
  node=$!
  wait "$node" || true
  echo "this node has left the cluster of $head; trying again in 5 s" >&2
  sleep 5 &
  node=$!
  wait "$node" || true
done
