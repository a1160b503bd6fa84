#!/usr/bin/env bash
# Trains on several machines without a batch system. Run it on each of them, with the same arguments but its own NUMBER:
#
#     scripts/multinode.sh MACHINES NUMBER MASTER[:PORT] ARGUMENT...
#     scripts/multinode.sh 2 0 node-a --config configs/paper.yaml --name both       on node-a
#     scripts/multinode.sh 2 1 node-a --config configs/paper.yaml --name both       on the other
#
# MASTER is how the others reach machine 0; its port (29500) has to be free and open. Model and runs/ have to be the same
# folders everywhere. A run that was stopped goes on with --resume runs/both in place of the arguments.
# One process a GPU; the variable PROCESSES says otherwise. Where a machine's name does not lead to its own address in
# the network that they share, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME have to name that network's interface.
# SIGTERM or SIGUSR1 to this script on any of the machines: the step is finished and saved everywhere. See the head of
# negotiator/train.py; torchrun itself ends with 1 then.
set -euo pipefail
usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ $# -ge 3 && $1 =~ ^[1-9][0-9]*$ && $2 =~ ^[0-9]+$ && $2 -lt $1 ]] || usage
machines=$1 number=$2 master=$3
shift 3
processes=${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[[ $processes -gt 0 ]] || { echo "error: no GPU is here; set PROCESSES to how many processes are to run on CPUs" >&2; exit 2; }
port=29500
[[ $master =~ ^(.*):([0-9]+)$ ]] && master=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# torchrun takes SIGUSR1 as the end of itself unless told, and kills its processes 30 s after a signal.
exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
    --nnodes "$machines" --node-rank "$number" --nproc-per-node "$processes" \
    --master-addr "$master" --master-port "$port" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 600 \
    -m negotiator.train "$@"
