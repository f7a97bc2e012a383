#!/bin/bash
# Train on several machines of a SLURM cluster, with what `mm-gpt train` takes:
#
#     sbatch --nodes=2 examples/cluster/slurm.sh gpt2-small --data /shared/corpus --out /shared/runs/gpt2 train.steps=20000
#
# One task a machine starts torchrun, which starts a process for each GPU. --out must be a folder that all machines see.
# Ten minutes before the time is up the run is told to finish its step and save, and the job is queued again, as SLURM does
# with one that it preempts. --resume goes on where a run stopped, and begins one that there is not yet.
#SBATCH --job-name=mm-gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${machines%%$'\n'*}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # reaches the processes, not this script

# Without a longer time to shut down torchrun kills what has not saved in 30 seconds
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first:29500" \
    --shutdown-timeout=540 \
    -m mm_gpt train "$@" --resume &
run=$!

status=0
wait "$run" || status=$?
while kill -0 "$run" 2>/dev/null; do # the signal ended the wait, not the run
    status=0
    wait "$run" || status=$?
done
if [ -n "$stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
