"""Program that knows megatron-core alone: ``python plain_megatron.py CHECKPOINT SHAPE OUTPUT``.

It loads a checkpoint into a GPTModel of the shape that the JSON text SHAPE has, and saves its weights by name.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig


def main(folder: str, shape_text: str, output: str) -> None:
    shape = json.loads(shape_text)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    config = TransformerConfig(
        **{name: shape[name] for name in (*sizes, "add_qkv_bias", "qk_layernorm")},
        normalization="RMSNorm",
        layernorm_epsilon=shape["norm_epsilon"],
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=shape["qk_layernorm"], normalization="RMSNorm"),
        vocab_size=shape["rows"],
        max_sequence_length=16,
        share_embeddings_and_output_weights=shape["tied"],
        position_embedding_type="rope",
    )
    loaded = dist_checkpointing.load(model.sharded_state_dict(), folder)
    missing, more = model.load_state_dict(loaded, strict=False)
    assert not [name for name in missing if "_extra_state" not in name], missing
    assert set(more) <= {"optimizer"}, more  # what common.pt holds beside the weights
    assert not [name for name in sys.modules if name.split(".")[0] == "megakd"]
    weights = {name: weight for name, weight in model.state_dict().items() if isinstance(weight, torch.Tensor)}
    torch.save(weights, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
