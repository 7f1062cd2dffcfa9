"""Models of an evaluation, built in its layout, and the desk at which text is scored."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.data.tokenizer import Tokenizer
from megakd.losses.vocab_parallel import VocabShard
from megakd.parallel import Groups
from megakd.pipeline.evaluate.config import EvaluateConfig
from megakd.pipeline.evaluate.likelihood import ContinuationScorer, Desk
from megakd.pipeline.evaluate.preflight import EvaluatePlan
from megakd.pipeline.evaluate.text import TextCodec
from megakd.pipeline.frozen.model import build_frozen, vocab_shard
from megakd.teachers.model_teacher import ModelTeacher


@dataclass(frozen=True)
class Models:
    """The evaluated model, the teacher beside it if there is one, and this rank's slice of their vocabulary."""

    model: ModelTeacher
    teacher: ModelTeacher | None
    shard: VocabShard


def build_models(config: EvaluateConfig, plan: EvaluatePlan, groups: Groups) -> Models:
    """Build and load the models. All ranks call it."""
    shard = vocab_shard(plan.model.record, plan.model.shape, groups)
    model = build_frozen(plan.model.record, plan.model.shape, groups, seq_length=plan.seq_length)
    teacher = None
    if plan.teacher is not None:
        # its rows of the head are cut as the model's, whatever padding either was trained with
        teacher = build_frozen(
            plan.teacher.record, plan.teacher.shape, groups, seq_length=plan.seq_length, rows=shard.num_rows
        )
    return Models(model, teacher, shard)


def open_desk(config: EvaluateConfig, plan: EvaluatePlan, models: Models, groups: Groups) -> Desk:
    """Open the desk for requests to the model. All ranks call it."""
    scorer = ContinuationScorer(
        models.model,
        groups,
        models.shard,
        model=str(plan.model.record.path),
        max_length=plan.seq_length,
        micro_batch_size=config.micro_batch_size,
        log_interval=config.log_interval,
        implementation=config.loss_implementation,
        chunk_bytes=config.head_chunk_mbytes << 20,
    )
    return Desk(scorer, groups)


def codec_of(config: EvaluateConfig, tokenizer: Tokenizer) -> TextCodec:
    """Make the codec of the model's tokenizer that the flags ask for."""
    return TextCodec.of(tokenizer, add_bos_token=config.add_bos_token, prefix_token_id=config.prefix_token_id)
