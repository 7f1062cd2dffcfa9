"""Results of the distillation law as text: Markdown tables that read as well on a terminal."""

from __future__ import annotations

import math

import numpy as np

from megakd.pipeline.planning.distillation import Account, DistillPlan, Pair, StudentPlan, law_parameters
from megakd.pipeline.planning.distillation_law import PUBLISHED, DistillationLaw
from megakd.work.text_table import markdown

_ACCOUNTS = ("its outputs are there", "it runs along", "it is trained too")


def describe_distillation(plan: DistillPlan) -> list[str]:
    """Lines of Markdown about the law and every student."""
    return [*_law(plan), *(line for student in plan.students for line in _student(student))]


def _law(plan: DistillPlan) -> list[str]:
    law = plan.law
    lines = [
        "## Distillation scaling law",
        "",
        "Alone:      L~ = E + (A / N^a + B / D^b)^g",
        "Distilled:  L = L_T + L_T^-c0 x [1 + (L_T / (L~ d1))^(1/f1)]^(-c1 f1) x (A' / N^a' + B' / D^b')^g'",
        "",
        f"N: parameters without embeddings, D: tokens, L_T: the teacher's loss. Constants: {law.source}.",
        "",
        *markdown(["", "E", "A", "B", "a", "b", "g", "c0", "c1", "f1", "d1"], _constants(law)),
    ]
    if plan.fit is not None:
        alone, distilled = plan.fit.alone_residuals_n, plan.fit.distilled_residuals_n
        away = f"{np.abs(alone).mean():.3%} of the runs alone, {np.abs(distilled).mean():.3%} of the distilled ones"
        lines += ["", f"Mean distance from the law: {away}."]
    if law is PUBLISHED:
        lines += [
            "",
            "Warning: these constants do not transfer to other data, tokenizers or recipes; only the form does. Take",
            "the order of the choices from them, not the losses, and fit your own to small runs (--distill-fit).",
        ]
    return [*lines, ""]


def _constants(law: DistillationLaw) -> list[list[str]]:
    def numbers(*values: float) -> list[str]:
        return [f"{value:.4g}" for value in values]

    alone = law.alone
    scales = (alone.parameters_scale, alone.tokens_scale)
    exponents = (alone.parameters_exponent, alone.tokens_exponent, alone.outer_exponent)
    distilled = (
        law.parameters_scale,
        law.tokens_scale,
        law.parameters_exponent,
        law.tokens_exponent,
        law.outer_exponent,
    )
    return [
        ["alone", *numbers(alone.floor, *scales, *exponents), "", "", "", ""],
        ["distilled", "", *numbers(*distilled, law.c0, law.c1, law.f1, law.d1)],
    ]


def _student(plan: StudentPlan) -> list[str]:
    rows = [_row(plan, pair, pair is plan.best and len(plan.pairs) > 1) for pair in plan.pairs]
    lines = [
        f"### {plan.student.name} on {plan.tokens:.3g} tokens: {plan.alone_loss:.4f} alone",
        "",
        *markdown(["teacher", "its loss", "distilled", "better by", "wins at equal tokens", ""], rows),
        "",
    ]
    priced = [pair for pair in plan.pairs if len(pair.accounts) > 1]
    if priced:
        rows = [_row_of_account(pair, *named) for pair in priced for named in zip(_ACCOUNTS, pair.accounts)]
        headings = ["teacher", "counted", "FLOPs", "alone, at as many", "better by", "wins at equal FLOPs", "worth it"]
        lines += [*markdown(headings, rows), ""]
    least = plan.best_teacher_loss
    body = law_parameters(plan.student)
    return [*lines, f"The best teacher for {body:.3g} parameters and so many tokens would have loss {least:.3f}.", ""]


def _row(plan: StudentPlan, pair: Pair, best: bool) -> list[str]:
    gain = plan.alone_loss - pair.loss
    figures = [f"{pair.teacher.loss:.4f}", f"{pair.loss:.4f}", f"{gain:.4f}"]
    return [pair.teacher.name, *figures, _range(pair.accounts[0]), "best" if best else ""]


def _row_of_account(pair: Pair, name: str, account: Account) -> list[str]:
    gain = account.alone_loss - pair.loss
    figures = [f"{account.flops:.3g}", f"{account.alone_loss:.4f}", f"{gain:.4f}"]
    return [pair.teacher.name, name, *figures, _range(account), "yes" if gain > 0 else "no"]


def _range(account: Account) -> str:
    if account.wins is None:
        return "never"
    low, high = account.wins
    if low == 0:
        return "always" if math.isinf(high) else f"to {high:.3g} tokens"
    return f"from {low:.3g} tokens" if math.isinf(high) else f"{low:.3g} to {high:.3g} tokens"
