#!/usr/bin/env bash
# Trains on a Slurm cluster, from the project's folder, which all nodes have to see:
#
#     sbatch scripts/slurm.sh --config configs/paper.yaml
#     sbatch --nodes 4 --gpus-per-node 4 scripts/slurm.sh --config configs/paper.yaml --optimizer.lr 1e-6
#
# Some time before the limit, or when it is pre-empted (PreemptParameters=send_user_signal), the job gets SIGUSR1: it
# finishes its step, saves, and is put into the queue again. There, as after the failure of a node, it goes on with what
# it saved last. The time has to suffice for a step and a checkpoint: --signal=B:USR1@600 for long ones.
# RUNS: folder of all runs. A job of a mistake or an error is not queued again, and ends with 1.
#SBATCH --job-name=negotiator
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
name=slurm-$SLURM_JOB_ID
runs=${RUNS:-runs}
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:?ask for GPUs, or set PROCESSES to how many run on the CPUs of a node}}
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node need different ones
arguments=("$@" --runs "$runs" --name "$name")
if [[ -e $runs/$name/config.yaml ]]; then
    arguments=(--resume "$runs/$name")
fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

# srun hands signals on to torchrun, and torchrun to its processes. The trainer ends with 138 after SIGUSR1 and 143 after
# SIGTERM, but torchrun with 1 whatever they end with, so that what counts here is whether the signal came.
asked='' interrupted=''
trap 'asked=USR1 interrupted=yes; kill -USR1 $! || true' USR1
trap 'asked=TERM interrupted=yes; kill -TERM $! || true' TERM

srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-endpoint "$master:$port" --rdzv-id "$SLURM_JOB_ID" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 600 \
    -m negotiator.train "${arguments[@]}" &
while :; do
    interrupted='' status=0
    wait $! || status=$?
    [[ $interrupted ]] || break # else a signal ended the waiting, not the job
done

if [[ $asked == TERM ]]; then
    exit 143
elif [[ $status -ne 0 && $asked == USR1 ]]; then
    echo "stopped before the end; queueing job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 138
fi
exit "$status"
