#!/usr/bin/env bash
# Starts Ray on the nodes of a SLURM allocation and runs a command on the first of them. Submit it
# from a folder that all nodes share, with the virtual environment active:
#
#     sbatch --nodes 4 --gpus-per-node 1 .slurm/ray.sh python jobs/train.py \
#         --shards /shared/shards --storage /shared/runs --device gpu --workers 1..4
#
# The job's exit status is that of the command. A requeued job runs the command again, and the
# command resumes its work.
#SBATCH --job-name=ser-ray
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

(($#)) || { echo "usage: sbatch [OPTIONS] .slurm/ray.sh COMMAND ..." >&2; exit 2; }
# Everybody who can reach Ray's port could run code, so Ray is told to ask for a token. All nodes
# read the token from RAY_AUTH_TOKEN or ~/.ray/auth_token.
export RAY_AUTH_MODE=token
[[ -n ${RAY_AUTH_TOKEN:-} || -r ~/.ray/auth_token ]] ||
    { echo "there is no token: run 'ray get-auth-token --generate' once" >&2; exit 2; }

nodes=${SLURM_JOB_NUM_NODES:?this script is run by sbatch}
# In a pipe to `head -1`, scontrol could get SIGPIPE, and `pipefail` would end this script.
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
read -r ip _ < <(getent ahostsv4 "$head")
address=$ip:$((20000 + SLURM_JOB_ID % 10000))
export TMPDIR=/tmp # the path that SLURM sets is too long for Ray's sockets
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch
size=(--num-cpus "${SLURM_CPUS_PER_TASK:-1}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}")

srun --overlap --nodes 1 --ntasks 1 --nodelist "$head" \
    ray start --head --block --node-ip-address "${address%:*}" --port "${address#*:}" \
    --include-dashboard false "${size[@]}" &
if ((nodes > 1)); then
    srun --overlap --nodes $((nodes - 1)) --ntasks $((nodes - 1)) --exclude "$head" \
        ray start --block --address "$address" "${size[@]}" &
fi
trap 'jobs -p | xargs -r kill; wait' EXIT

export RAY_ADDRESS=$address
deadline=$((SECONDS + 300))
until ray status --address "$address" &> /dev/null; do
    ((SECONDS < deadline)) || { echo "Ray did not start on $head in five minutes" >&2; exit 1; }
    sleep 1
done
python - "$nodes" << 'END'
import sys, time
import ray

ray.init(logging_level="ERROR", log_to_driver=False)
deadline = time.monotonic() + 300
while (alive := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[1]):
    if time.monotonic() > deadline:
        sys.exit(f"only {alive} of {sys.argv[1]} nodes have joined Ray in five minutes")
    time.sleep(1)
END
"$@"
