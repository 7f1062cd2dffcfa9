#!/usr/bin/env bash
# run.sh RECIPE VERB [flags]: capture or train with a recipe of this folder, on one node, or on one of several: set
# NNODES, NODE_RANK and MASTER_ADDR. Further flags override the recipe.
set -eu
recipes=$(dirname "$0")/recipes
recipe=${1:?a folder of $recipes} verb=${2:?capture or train}
shift 2
configs=(--config "$recipes/$recipe/$verb.yaml")
if [ "$verb" = train ]; then configs=(--config "$recipes/student.yaml" "${configs[@]}"); fi
NPROC=${NPROC:-8} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=${MASTER_PORT:-29500}
export CUDA_DEVICE_MAX_CONNECTIONS=1  # megatron-core orders its kernels by it
exec torchrun --nproc-per-node "$NPROC" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --no-python megakd "$verb" "${configs[@]}" "$@"
