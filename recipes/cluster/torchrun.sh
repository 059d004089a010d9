#!/usr/bin/env bash
# One machine, one process per GPU:
#
#     recipes/cluster/torchrun.sh pipeline recipes/quickstart.yaml
#     recipes/cluster/torchrun.sh sft my.yaml --sequence_parallel_size 2
#
# RANKS         processes; default: the GPUs that nvidia-smi lists, one where there are none
# MAX_RESTARTS  how often all ranks are started again after one has died; each time from the last checkpoint
set -euo pipefail

gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}

# Without it torchrun sets OMP_NUM_THREADS=1 and says so. The trainer's own number is the key num_threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec torchrun --standalone --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-3}" -m nova_train "$@"
