#!/usr/bin/env bash
# A run on Slurm: the first node learns, the others sample. Submit it from the repository's folder.
#
#   usage: sbatch --nodes=3 --gpus-per-node=8 scripts/run_slurm.sh CONFIG [flags of lmmr1_jax.train]
#          sbatch --nodes=1 --constraint=tpu : --nodes=2 --gpus-per-node=8 scripts/run_slurm.sh CONFIG [flags]
#
# The first form takes equal nodes, the second a learner of one kind and samplers of another. In the environment:
#
#     PYTHON        of the learner (default .venv/bin/python)
#     SAMPLER_RAY   `ray` of the samplers' environment (default: beside PYTHON); requirements-sampler.txt
#     ADDRESS       of the learner's node, if `hostname -I` does not name the right one first
#
# The run goes on from its newest checkpoint whenever the job starts again: after a pre-emption, by --requeue, and when
# the time limit is near, by itself. It ends its node's and the samplers' Ray when it ends.
#SBATCH --job-name=lmmr1_jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail

config=${1:?usage: sbatch --nodes=3 scripts/run_slurm.sh CONFIG [flags of lmmr1_jax.train]}
python=${PYTHON:-.venv/bin/python}
ray=$(dirname "$python")/ray
address=${ADDRESS:-$(hostname -I | cut -d ' ' -f 1)}
port=$((20000 + SLURM_JOB_ID % 10000))

if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then
  nodes=$SLURM_JOB_NODELIST_HET_GROUP_1
  cpus=${SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1%%(*}
  where=(--het-group=1)
  samplers=$(scontrol show hostnames "$nodes" | wc -l)
else
  cpus=${SLURM_JOB_CPUS_PER_NODE%%(*}
  where=(--exclude="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
  samplers=$((SLURM_JOB_NUM_NODES - 1))
fi
[ "$samplers" -gt 0 ] || { echo "error: one node learns and none is left to sample; ask for more" >&2; exit 2; }

# For this job alone; srun hands it to the samplers.
RAY_AUTH_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN

RAY=$ray scripts/ray_head.sh "$address" "$port" &
head=$!
RAY=${SAMPLER_RAY:-$ray} srun "${where[@]}" --nodes="$samplers" --ntasks="$samplers" --ntasks-per-node=1 \
  --cpus-per-task="${cpus%%,*}" scripts/ray_sampler.sh "$address:$port" --num-cpus="${cpus%%,*}" &
nodes_step=$!
# The samplers start at the same time as the run; a flag of yours comes later and wins.
"$python" -m lmmr1_jax.train --config "$config" --resume --ray.address "$address:$port" --vllm.resource sampler \
  --ray.timeout 600 "${@:2}" &
learner=$!

# The learner writes a checkpoint and ends with 143. Of a pre-empted job Slurm itself takes care.
again=
trap 'kill -TERM "$learner" 2>/dev/null || true' TERM
trap 'again=1; kill -TERM "$learner" 2>/dev/null || true' USR1
while kill -0 "$learner" 2>/dev/null; do
  wait "$learner" || true # which a signal ends as well
done
status=0
wait "$learner" || status=$?

kill -TERM "$nodes_step" "$head" 2>/dev/null || true
wait "$nodes_step" "$head" || true
if [ -n "$again" ] && [ "$status" = 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
