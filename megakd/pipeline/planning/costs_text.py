"""A plan as text: Markdown tables that read as well on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.pipeline.planning.config import CostConfig
from megakd.pipeline.planning.costs import (
    STUDENT_COUNTS,
    Refinement,
    advise_ratio,
    amortised,
    epochs,
    gpu_hours,
    minillm_steps,
    storage,
    vanilla_kd_steps,
    verdict,
)
from megakd.pipeline.planning.curves import Curve
from megakd.pipeline.planning.scaling_law import Estimate, ScalingFit
from megakd.work.text_table import markdown

_RATIOS = (0.5, 0.25, 0.125)  # what the paper compared where data is short

FIT_NOTE = [
    "## Scaling laws",
    "",
    "L(C) = L_inf + A / C^a. C = 6 x N x tokens: the model's own training; neither a teacher beside it nor scoring.",
    "Points within one run share its noise and its learning rate, so that intervals from one run are too narrow.",
    "",
]


def describe_costs(config: CostConfig, plan: Refinement) -> list[str]:
    """Lines of Markdown about the costs, all of which follow from sizes alone."""
    return [
        *_models(plan),
        *_work(config, plan),
        *_steps(plan),
        *_amortisation(plan),
        *_data(plan),
        *_storage(config, plan),
    ]


def describe_fit(curve: Curve, fit: ScalingFit, flops: Sequence[float], first: tuple[str, ScalingFit]) -> list[str]:
    """Lines about one fitted curve. flops: computes to extrapolate to. first: the curve to compare with, its fit."""
    law, constants = fit.law, fit.constants
    percent = f"{fit.level:.0%}"
    rows = [
        ["L_inf", *_spread(constants["floor"], ".4f")],
        ["A", *_spread(constants["coefficient"], ".3g")],
        ["a", *_spread(constants["exponent"], ".4f")],
    ]
    rows += [[f"L at C = {at:.3g}{_tokens(curve, at)}", *_spread(fit.at(at), ".4f")] for at in flops]
    noise = float(abs(fit.residuals_n).mean())
    lines = [
        f"### {curve.name}",
        "",
        f"L(C) = {law.floor:.4f} + {law.coefficient:.3g} / C^{law.exponent:.4f}, from {len(fit.loss_n)} points, "
        f"C {fit.flops_n[0]:.3g} to {fit.flops_n[-1]:.3g}, mean distance {noise:.2%}.",
        "",
        *markdown(["", "value", f"{percent} from", "to"], rows),
    ]
    name, other = first
    if fit is not other:
        end = float(other.flops_n[-1])
        ratio = law.flops(other.law.loss(end)) / end
        reached = f"takes {ratio:.3g} times the compute" if ratio < float("inf") else "never comes"
        lines += ["", f"To the loss of {name} at its last point (C = {end:.3g}) it {reached}."]
    lines += [text for doubt in fit.doubts for text in ("", f"Warning: {doubt}.")]
    farthest = max(flops, default=0.0) / float(fit.flops_n[-1])
    if farthest > 100:
        lines += ["", f"Warning: C = {max(flops):.3g} is {farthest:.3g} times the last point; the law may end before."]
    return [*lines, ""]


def _models(plan: Refinement) -> list[str]:
    proxy = [("proxy", plan.proxy)] if plan.proxy is not None else []
    students = [("student", size) for size in plan.students]
    models = [("teacher", plan.teacher), ("reference", plan.reference), *proxy, *students]
    rows = []
    for role, size in models:
        attention = "not known" if size.attention is None else f"+{size.attention:.1%}"
        rows.append([role, size.name, f"{size.parameters:.4g}", attention])
    return [
        "## Models",
        "",
        "A token costs 2N FLOPs forward, 6N in training. N: the parameters that multiply a token, with one projection",
        "to the vocabulary, without an untied input embedding (a lookup) and attention scores; a number is taken as N.",
        "",
        *markdown(["", "", "N", "attention scores would add"], rows),
        "",
    ]


def _work(config: CostConfig, plan: Refinement) -> list[str]:
    work = [
        (f"train the reference {plan.reference.name}", plan.reference_tokens, plan.reference_flops),
        (f"score with the teacher {plan.teacher.name}", plan.scored_tokens, plan.scoring_flops(plan.teacher)),
        (f"score with the reference {plan.reference.name}", plan.scored_tokens, plan.scoring_flops(plan.reference)),
        ("all before the first student", None, plan.offline_flops),
    ]
    if plan.proxy is not None and plan.proxy_flops is not None:
        work.append((f"the same by a proxy {plan.proxy.name}", plan.scored_tokens, plan.proxy_flops))
    work += [(f"train a student {size.name}", plan.train_tokens, plan.training_flops(size)) for size in plan.students]
    headings, rows = ["", "tokens", "FLOPs"], []
    headings += ["GPU-hours"] if config.tflops_per_gpu is not None else []
    headings += [f"days on {config.num_gpus}"] if config.num_gpus is not None else []
    for name, tokens, flops in work:
        row = [name, "" if tokens is None else f"{tokens:.4g}", f"{flops:.3g}"]
        if config.tflops_per_gpu is not None:
            hours = gpu_hours(flops, config.tflops_per_gpu)
            row += [f"{hours:,.1f}"]
            row += [f"{hours / 24 / config.num_gpus:.2f}"] if config.num_gpus is not None else []
        rows.append(row)
    return ["## Work", "", *markdown(headings, rows), ""]


def _steps(plan: Refinement) -> list[str]:
    rows = []
    for size in plan.students:
        sizes = {"student": size.parameters, "teacher": plan.teacher.parameters}
        kd, minillm = vanilla_kd_steps(plan.steps, **sizes), minillm_steps(plan.steps, **sizes)
        rows.append([size.name, f"{plan.steps:,}", f"{int(kd):,}", f"{int(minillm):,}"])
    return [
        "## Steps at equal FLOPs of training",
        "",
        *markdown(["student", "alone, or on refined data", "vanilla KD", "MiniLLM"], rows),
        "",
        "Scoring is not in this comparison (nor in the paper's); it is below.",
        "",
    ]


def _amortisation(plan: Refinement) -> list[str]:
    rows = [[size.name, *(f"{share:.1%}" for share in amortised(plan, size))] for size in plan.students]
    return [
        "## The work before, as a share of one student's training, when so many students use it",
        "",
        *markdown(["student", *map(str, STUDENT_COUNTS)], rows),
        "",
        f"From {plan.break_even_runs:.1f} students on it costs less than a teacher beside each of them for "
        f"{plan.train_tokens:.3g} tokens.",
        "",
    ]


def _data(plan: Refinement) -> list[str]:
    advice = advise_ratio(plan.train_tokens, plan.scored_tokens)
    ratios = sorted({*_RATIOS, plan.ratio, advice.ratio}, reverse=True)
    rows = []
    for ratio in ratios:
        passes = epochs(plan.train_tokens, plan.scored_tokens, ratio)
        marks = [name for name, value in (("given", plan.ratio), ("advised", advice.ratio)) if value == ratio]
        figures = [f"{ratio:.3g}", f"{ratio * plan.scored_tokens:.3g}", f"{passes:.2f}"]
        rows.append([*figures, verdict(round(passes, 6)), ", ".join(marks)])
    return [
        f"## Data: {plan.scored_tokens:.4g} tokens to choose from, {plan.train_tokens:.4g} to train on",
        "",
        *markdown(["ratio", "tokens kept", "epochs", "", ""], rows),
        "",
        advice.text,
        "Measured was training on 0.5 and on 1 times the tokens there are; between and beyond is a rule of thumb.",
        "",
    ]


def _storage(config: CostConfig, plan: Refinement) -> list[str]:
    outputs = int(config.per_token_log_probs) + int(config.per_token_entropy)
    on_disk = storage(plan, seq_length=config.seq_length, vocab_size=config.vocab_size, token_outputs=outputs)
    rows = [
        ["the corpus, tokenised", _bytes(on_disk.corpus)],
        ["scores of one model", _bytes(on_disk.scores)],
        ["the selection", _bytes(on_disk.selection)],
        ["a refined copy (--materialize; training from the selection needs none)", _bytes(on_disk.refined)],
    ]
    return ["## Storage", "", *markdown(["", ""], rows), ""]


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def _tokens(curve: Curve, flops: float) -> str:
    return "" if curve.parameters is None else f" ({flops / (6 * curve.parameters):.3g} tokens)"


def _spread(estimate: Estimate, form: str) -> list[str]:
    return [format(value, form) for value in (estimate.value, estimate.low, estimate.high)]
