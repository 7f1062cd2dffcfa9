"""Refusals before a selection: scores of the wrong kind, or of a part of the samples only."""

from __future__ import annotations

from megakd.data.scores.artefact import Scores
from megakd.data.scores.sources import Source, open_sources
from megakd.errors import UsageError
from megakd.pipeline.select.config import SelectConfig


def open_scored(config: SelectConfig) -> list[Source]:
    """Open the scores that the flags name, one source for each output.

    Raises UsageError for a proxy's predictions where a model's scores are asked for, for a model's scores where
    predictions are, and for scores of a sample; and whatever ``open_sources`` raises.
    """
    models = {name: folders for name, (_, folders) in config.models().items()}
    for name, folders in models.items():
        for folder in folders:
            predicts = "predicts" in Scores(folder).manifest.parameters
            if config.proxy_scores and not predicts:
                raise UsageError(
                    f"--proxy-scores {folder}: the scores of a model, not a proxy's predictions ('megakd score "
                    "--proxy'); give two models' by --teacher-scores and --reference-scores"
                )
            if predicts and not config.proxy_scores and not config.scores:
                raise UsageError(
                    f"--{name}-scores {folder}: a proxy's predictions of the difference already; give them alone, "
                    "by --proxy-scores"
                )
    sources = open_sources(
        models,
        outputs=config.output,
        data_path=config.data_path,
        normalise=config.normalise,
        exclude_ids=config.exclude_ids,
        tokenizer_model=config.tokenizer_model,
    )
    for source in sources:
        _refuse_sampled(source)
    return sources


def _refuse_sampled(source: Source) -> None:
    scores = source.any_scores
    if scores.sampled is not None:
        how = ", ".join(f"{key} {value}" for key, value in scores.sampled.items() if key != "num_scored")
        raise UsageError(
            f"{scores.folder}: scores of {scores.sampled['num_scored']} of {scores.num_samples} samples "
            f"({how}); the others would be dropped unseen. 'megakd proxy' "
            "learns from these, and 'megakd score --proxy DIR' scores them all; or score all of them"
        )
