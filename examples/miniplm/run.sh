#!/usr/bin/env bash
# One verb that runs a model (train, score) on one node, or on one of several: set NNODES, NODE_RANK and MASTER_ADDR.
set -eu
NPROC=${NPROC:-8} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=${MASTER_PORT:-29500}
export CUDA_DEVICE_MAX_CONNECTIONS=1  # megatron-core orders its kernels by it
exec torchrun --nproc-per-node "$NPROC" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --no-python megakd "$@"
