"""Objective of the training: the weight of each token in each term, and the loss of one microbatch.

Axes: B microbatch, S sequence, T = S x B flattened tokens in megatron's order (sequence first), H hidden, v this rank's
slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megakd.losses.calibration import calibration_sums
from megakd.losses.head import (
    DEFAULT_CHUNK_BYTES,
    KD,
    HeadOutput,
    KDTerm,
    VocabShard,
    WeightGrad,
    default_chunk_bytes,
    head_loss,
)
from megakd.losses.kernels.choose import Implementation
from megakd.losses.rows import KDOutput
from megakd.parallel import Groups
from megakd.targets import DenseTargets, Given, MixedTargets, SparseTargets, Targets
from megakd.train.objective.config import ObjectiveConfig
from megakd.train.objective.gates import Gated, Gates, apply_gates, tokens_with_targets
from megakd.train.objective.schedule import KDSchedule
from megakd.train.objective.taid import Taid
from megakd.train.objective.token_temperature import TokenTemperature

# isort: split
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


@dataclass(frozen=True)
class TokenLosses:
    """Loss of one microbatch, and the values of its tokens.

    loss: the weighted sum, differentiable, to be divided by the number of tokens in ``kept_T``.
    mask_T, kept_T, kd_T: bool, the tokens that the loss mask keeps, those of them that are trained on, and those of
        these that get KD. known_T: bool, the tokens whose values were computed. stored_T: bool, the tokens of the mask
        with stored targets.
    head: the values of every term for each token. kd: the values of each token's KD term; None without KD.
    temperature_T: of the teacher's logits, fp32; None if all tokens have the same. calibration: sums by bin of
    confidence, see ``calibration.calibration_sums``; None in training. asked_model: True if a model ran as teacher.
    """

    loss: Tensor
    mask_T: Tensor
    kept_T: Tensor
    kd_T: Tensor
    known_T: Tensor
    stored_T: Tensor
    head: HeadOutput
    kd: KDOutput | None = None
    temperature_T: Tensor | None = None
    calibration: Tensor | None = None
    asked_model: bool = False


@dataclass(frozen=True)
class Objective:
    """loss = (1 - alpha) · LM + alpha · KD + z_loss_coeff · log_z², each a sum over the tokens that are trained on.

    Pre-training distillation, arXiv 2410.16215, equation 1. Without a teacher alpha is 0; ``lm_weight``, if given,
    replaces 1 - alpha. The caller takes the mean, once the global batch is complete, over all of its tokens that are
    trained on: a token that Rho-1 drops counts as masked (arXiv 2404.07965, equation 4), while a token that the entropy
    gate takes from KD still counts, with its LM loss at weight 1 - alpha. A token without targets has its LM loss
    alone, at weight 1.

    taid: that divergence's rule and progress, which change the target from step to step. schedule: alpha and the
    temperature of each step; `at` returns the objective of one step. token_temperature: gives each token its own.
    from_store: some tokens at least have stored targets. calibrate: measure the calibration too, from logits of its
    own. weight_grad: the way of the head's weight gradient, as for `head_loss`.
    """

    alpha: float
    term: KDTerm | None
    shard: VocabShard
    sequence_parallel: bool
    z_loss_coeff: float = 0.0
    gates: Gates = Gates()
    taid: Taid | None = None
    lm_weight: float | None = None
    schedule: KDSchedule | None = None
    token_temperature: TokenTemperature | None = None
    from_store: bool = False
    calibrate: bool = False
    implementation: Implementation = "auto"
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    weight_grad: WeightGrad = "autograd"

    def at(self, step: int) -> Objective:
        """Return the objective of one step. If alpha is 0, it needs a teacher only for Rho-1's choice."""
        if self.schedule is None or self.term is None:
            return self
        alpha = self.schedule.alpha.at(step)
        if alpha == 0:
            return replace(self, alpha=0.0, term=None, gates=replace(self.gates, entropy_gate=0.0))
        return replace(self, alpha=alpha, term=replace(self.term, temperature=self.schedule.temperature.at(step)))

    @property
    def needs_teacher(self) -> bool:
        """True if a term or a gate reads the teacher's targets."""
        return self.term is not None or self.gates.closed

    @property
    def lm_share(self) -> float:
        """Weight of the LM loss of a token."""
        return 1.0 - self.alpha if self.lm_weight is None else self.lm_weight

    def __call__(
        self,
        hidden_SBH: Tensor,
        weight_vH: Tensor,
        labels_SB: Tensor,
        mask_SB: Tensor,
        targets: Given,
        *,
        whole: bool = False,
    ) -> TokenLosses:
        """Return the loss of this microbatch and the values of its tokens.

        hidden_SBH: the last stage's output; under sequence parallelism ``[S / TP, B, H]``. whole: the mask is known to
        leave no token out, so that the device need not be asked which ones carry weight.
        """
        if self.sequence_parallel:
            # the backward of this reduce-scatters the partial gradients of the ranks
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True)
        hidden_TH = hidden_SBH.reshape(-1, hidden_SBH.shape[-1])
        labels_T, mask_T = labels_SB.reshape(-1), mask_SB.reshape(-1)
        gated = self._gate(hidden_TH, weight_vH, labels_T, mask_T, targets)
        kept_T, parts, temperature_T = gated.kept_T.float(), list[_TokensOfOneKind](), None
        lm_weight_T = kept_T * self.lm_share
        if self.term is not None:
            lm_weight_T = torch.where(tokens_with_targets(targets, mask_T), lm_weight_T, kept_T)
        if self.term is not None and targets is not None:
            term = self.term if self.taid is None else replace(self.term, taid_t=self.taid.t)
            if self.token_temperature is not None:
                tempered = self.token_temperature(targets, term.temperature)
                targets, temperature_T = tempered.targets, tempered.temperature_T
                term = replace(term, temperature=1.0)
            parts = _parts(targets, term, gated.kd_T)
        kd = [KD(part.term, part.targets, part.tokens_T.float() * self.alpha) for part in parts]
        head = head_loss(
            hidden_TH,
            weight_vH,
            labels_T,
            shard=self.shard,
            lm_weight_T=lm_weight_T,
            z_weight_T=kept_T * self.z_loss_coeff if self.z_loss_coeff > 0 else None,
            kd=kd,
            hidden_grad="partial" if self.sequence_parallel else "all_reduce",
            weight_grad=self.weight_grad,
            every_token=whole and self._weighs_all(targets),
            implementation=self.implementation,
            chunk_bytes=self.chunk_bytes,
        )
        known_T = gated.kept_T if self.z_loss_coeff > 0 else (lm_weight_T != 0) | gated.kd_T
        stored_T = _stored_tokens(targets, mask_T)
        return TokenLosses(
            loss=head.loss,
            mask_T=mask_T,
            kept_T=gated.kept_T,
            kd_T=gated.kd_T,
            known_T=known_T,
            stored_T=stored_T,
            head=head,
            kd=_merged(head.kd, parts),
            temperature_T=temperature_T,
            calibration=self._calibration(hidden_TH, weight_vH, labels_T, mask_T) if self.calibrate else None,
            asked_model=isinstance(targets, DenseTargets | MixedTargets),
        )

    def advance(self, step: int, kd: float | None) -> Objective:
        """Return the objective after the update of ``step``, which was made from the mean KD loss ``kd``."""
        if self.taid is None or kd is None:
            return self
        return replace(self, taid=self.taid.advance(step, kd))

    def held_out(self, *, with_teacher: bool = True) -> Objective:
        """Return the objective of an evaluation, whose values compare over steps and runs.

        It takes all tokens, the teacher itself as taid's target, and the largest alpha and temperature of schedules.
        with_teacher: False if no teacher has targets for the held-out data, which leaves the LM loss alone.
        """
        if not with_teacher:
            return replace(
                self, alpha=0.0, lm_weight=None, term=None, gates=Gates(), taid=None, schedule=None, calibrate=True
            )
        term = replace(self.term, taid_t=1.0) if self.term is not None else None
        return replace(self, term=term, gates=Gates(), taid=None, schedule=None, calibrate=True)

    def state(self) -> dict[str, Any]:
        """Return the state to be saved with the weights, as plain data."""
        taid = {} if self.taid is None else {"taid": self.taid.state()}
        return taid if self.schedule is None else {**taid, "schedule": self.schedule.state_dict()}

    def restored(self, state: Mapping[str, Any]) -> Objective:
        """Return the objective where it stood when `state` was called; a schedule has nothing to restore."""
        if self.taid is None or "taid" not in state:
            return self
        return replace(self, taid=self.taid.restored(state["taid"]))

    def _weighs_all(self, targets: Given) -> bool:
        """True if every token of the mask carries weight, whatever the values of the targets."""
        if self.gates.closed:
            return False
        with_kd = self.term is not None and self.alpha > 0 and isinstance(targets, DenseTargets)
        return self.lm_share != 0 or self.z_loss_coeff > 0 or with_kd

    def _calibration(self, hidden_TH: Tensor, weight_vH: Tensor, labels_T: Tensor, mask_T: Tensor) -> Tensor:
        return calibration_sums(
            hidden_TH,
            weight_vH,
            labels_T,
            mask_T,
            shard=self.shard,
            implementation=self.implementation,
            chunk_bytes=self.chunk_bytes,
        )

    def _gate(self, hidden_TH: Tensor, weight_vH: Tensor, labels_T: Tensor, mask_T: Tensor, targets: Given) -> Gated:
        if targets is None:
            return Gated(mask_T, torch.zeros_like(mask_T))
        gated = apply_gates(
            self.gates,
            hidden_TH,
            weight_vH,
            labels_T,
            mask_T,
            targets,
            shard=self.shard,
            chunk_bytes=self.chunk_bytes,
        )
        return gated if self.term is not None else Gated(gated.kept_T, torch.zeros_like(mask_T))


@dataclass(frozen=True)
class _TokensOfOneKind:
    """Tokens whose targets are of one kind, dense or sparse, and the KD term that compares them."""

    term: KDTerm
    targets: Targets
    tokens_T: Tensor


def _parts(targets: Given, term: KDTerm, kd_T: Tensor) -> list[_TokensOfOneKind]:
    if not isinstance(targets, MixedTargets):
        return [] if targets is None else [_TokensOfOneKind(term, targets, kd_T)]
    stored_T = _stored_tokens(targets, kd_T)
    whole = replace(term, tail="none")  # a model lists every id
    return [_TokensOfOneKind(term, targets.stored, stored_T), _TokensOfOneKind(whole, targets.model, kd_T & ~stored_T)]


def _stored_tokens(targets: Given, mask_T: Tensor) -> Tensor:
    """Return the tokens of the mask whose targets come from a store, bool ``[T]``."""
    stored = targets.stored if isinstance(targets, MixedTargets) else targets
    return tokens_with_targets(stored if isinstance(stored, SparseTargets) else None, mask_T)


def _merged(outputs: tuple[KDOutput, ...], parts: list[_TokensOfOneKind]) -> KDOutput | None:
    """Return for each token the values of the part that it is in; the parts share no token."""
    if not outputs:
        return None
    value_T, agree_T, entropy_T = outputs[0].value_T, outputs[0].agree_T, outputs[0].entropy_T
    for output, part in zip(outputs[1:], parts[1:]):
        value_T = torch.where(part.tokens_T, output.value_T, value_T)
        agree_T = torch.where(part.tokens_T, output.agree_T, agree_T)
        if entropy_T is not None and output.entropy_T is not None:
            entropy_T = torch.where(part.tokens_T, output.entropy_T, entropy_T)
        else:
            entropy_T = None
    return KDOutput(value_T, agree_T, entropy_T)


def make_objective(
    config: ObjectiveConfig,
    groups: Groups,
    *,
    vocab_size: int,
    padded_vocab_size: int,
    with_teacher: bool,
    from_store: bool,
    train_iters: int,
    schedule: KDSchedule | None,
) -> Objective:
    """Build the objective for this rank's slice of the vocabulary."""
    shard = groups.vocab_shard(vocab_size, padded_vocab_size=padded_vocab_size)
    with_kd = with_teacher and config.kd_alpha > 0
    chunk_bytes = config.head_chunk_mbytes << 20 if config.head_chunk_mbytes else default_chunk_bytes(groups.device)
    taid = Taid(
        t_start=config.taid_t_start,
        t_end=config.taid_t_end,
        alpha=config.taid_alpha,
        beta=config.taid_beta,
        train_iters=train_iters,
    )
    return Objective(
        alpha=config.kd_alpha if with_kd else 0.0,
        term=config.kd_term() if with_kd else None,
        shard=shard,
        sequence_parallel=groups.parallel.sequence_parallel,
        z_loss_coeff=config.z_loss_coeff,
        gates=Gates(config.rho_keep, config.kd_entropy_gate) if with_teacher else Gates(),
        taid=taid if with_kd and config.kd_divergence == "taid" else None,
        lm_weight=config.lm_weight if with_kd else None,
        schedule=schedule if with_kd else None,
        token_temperature=_token_temperature(config, shard, chunk_bytes) if with_kd else None,
        from_store=from_store,
        implementation=config.loss_implementation,
        chunk_bytes=chunk_bytes,
        # megatron's schedule passes 1 to the loss; on a CPU the blocks of a sum of its own stay in the cache
        weight_grad="main_grad" if groups.device.type == "cuda" else "autograd",
    )


def _token_temperature(config: ObjectiveConfig, shard: VocabShard, chunk_bytes: int) -> TokenTemperature | None:
    if config.kd_temperature_mode == "static":
        return None
    return TokenTemperature(
        config.kd_temperature_mode, uncertain=config.kd_temperature_uncertain, shard=shard, chunk_bytes=chunk_bytes
    )
