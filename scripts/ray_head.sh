#!/usr/bin/env bash
# Starts Ray's head node on the learner's machine and stays with it: Ctrl-C, or `kill` of this process, ends it.
#
#   usage: scripts/ray_head.sh [ADDRESS] [PORT] [flags of `ray start`]
#
#     ADDRESS   of this machine, by which the samplers reach it (default 127.0.0.1: no other machine does)
#     PORT      default 6379
#     RAY       in the environment: which `ray` to run
#
# The run is then told --ray.address ADDRESS:PORT. No engine comes to this machine unless it is given CPUs and GPUs
# (--num-cpus 8 --num-gpus 2).
#
# Whoever reaches a Ray cluster can run programs on it, and with an ADDRESS other than 127.0.0.1 it listens on all
# interfaces. So it asks for a token: RAY_AUTH_TOKEN, or the one in ~/.ray/auth_token, made here if there is none. Every
# sampler's machine needs the same. The traffic is not encrypted: keep it inside a network of your own.
set -euo pipefail

address=${1:-127.0.0.1}
port=${2:-6379}
ray=${RAY:-ray}

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
export RAY_USAGE_STATS_ENABLED=0
if [ "$address" = 127.0.0.1 ]; then
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # Ray's switch for keeping to localhost, on Linux too
fi
if [ "$RAY_AUTH_MODE" = token ]; then
  "$ray" get-auth-token --generate >/dev/null 2>&1
fi
exec "$ray" start --head --node-ip-address="$address" --port="$port" --num-cpus=0 --num-gpus=0 \
  --include-dashboard=false --block "${@:3}"
