#!/usr/bin/env bash
# One node, or one of several: set NNODES, NODE_RANK and MASTER_ADDR. Further flags override config.yaml.
set -eu
NPROC=${NPROC:-8} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=${MASTER_PORT:-29500}
export CUDA_DEVICE_MAX_CONNECTIONS=1  # megatron-core orders its kernels by it
exec torchrun --nproc-per-node "$NPROC" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    --no-python megakd train --config "$(dirname "$0")/config.yaml" "$@"
