"""Flags that Megatron-LM and this trainer share with different defaults."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.config.command_line import Line


@dataclass(frozen=True)
class Default:
    """A flag with two defaults. key: the option's place in the tree. matters: True if it changes the trained model."""

    key: str
    flag: str
    megatron: str
    ours: str
    matters: bool = False
    unless: str = ""
    """A flag that sets the same thing in another way."""

    def is_given(self, line: Line) -> bool:
        """Return True if the line or its files set the option."""
        return line.has(self.flag) or line.has(self.unless) or line.files.get(self.key) is not None


def tell_difference(row: Default) -> str:
    """Return both values in one phrase."""
    return f"{row.flag} {row.ours} (Megatron: {row.megatron})"


DEFAULTS: tuple[Default, ...] = (
    Default("student.normalization", "--normalization", "LayerNorm", "RMSNorm", True),
    Default("student.norm_epsilon", "--norm-epsilon", "1e-05", "1e-06", True),
    Default(
        "student.ffn_hidden_size",
        "--ffn-hidden-size",
        "8/3 of hidden, down to a multiple of 64",
        "8/3 of hidden, up to a multiple of 64",
        True,
    ),
    Default(
        "student.untie_embeddings_and_output_weights",
        "--untie-embeddings-and-output-weights",
        "tied",
        "untied, or as the preset says",
        True,
    ),
    Default("student.hidden_dropout", "--hidden-dropout", "0.1", "0.0", True),
    Default("student.attention_dropout", "--attention-dropout", "0.1", "0.0", True),
    Default("optim.adam_beta2", "--adam-beta2", "0.999", "0.95", True),
    Default("optim.weight_decay", "--weight-decay", "0.01", "0.1", True),
    Default("optim.lr_decay_style", "--lr-decay-style", "linear", "cosine", True),
    Default(
        "data.split", "--split", "969,30,1 of --data-path", "all of --data-path for training", True, "--valid-data-path"
    ),
    Default("optim.lr_wsd_decay_style", "--lr-wsd-decay-style", "exponential", "minus_sqrt"),
    Default("optim.lr", "--lr", "must be given", "0.0003"),
    Default(
        "student.num_query_groups",
        "--num-query-groups",
        "1, read only with --group-query-attention",
        "one a head; more than one head a group needs no other flag",
    ),
    Default(
        "student.rope_scaling_factor",
        "--rope-scaling-factor",
        "8.0, read only with --use-rope-scaling",
        "none; to give it is to scale",
    ),
    Default("student.moe_aux_loss_coeff", "--moe-aux-loss-coeff", "0.0", "0.01"),
    Default("student.moe_token_dispatcher_type", "--moe-token-dispatcher-type", "allgather", "alltoall"),
    Default("student.transformer_impl", "--transformer-impl", "transformer_engine", "auto"),
    Default("parallel.expert_tensor_parallel_size", "--expert-tensor-parallel-size", "TP", "1"),
    Default("student.fp8_recipe", "--fp8-recipe", "delayed", "tensorwise"),
    Default("training.train_iters", "--train-iters", "must be given", "1000"),
    Default("training.micro_batch_size", "--micro-batch-size", "must be given", "1"),
    Default("training.global_batch_size", "--global-batch-size", "micro batch x data-parallel size", "8"),
    Default("data.seq_length", "--seq-length", "must be given", "1024"),
    Default("evaluate.eval_interval", "--eval-interval", "1000", "100"),
    Default("evaluate.eval_iters", "--eval-iters", "100", "10"),
    Default("checkpoint.save_interval", "--save-interval", "must be given with --save", "1000"),
    Default("logging.log_interval", "--log-interval", "100", "10"),
)
