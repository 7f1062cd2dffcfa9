"""The losses that bench_loss.py times: ours, what a user would pick today, and the bare work that none can avoid.

A case is built once in a process of its own and then called on inputs. It returns the loss, or None where there is
nothing to differentiate. Peers are imported when their case is built; ImportError means that they are not installed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from loss_inputs import DISTIL, LM, HeadInputs, LogitInputs, Problem, forward_kl
from torch import Tensor
from torch.nn import functional

from megakd.losses.head import head_loss
from megakd.losses.logits import logits_loss
from megakd.losses.rows import KD
from megakd.losses.terms import KDTerm
from megakd.targets import LogitTargets

BANDWIDTH_ENTRIES, MATMUL_SIZE = 1 << 27, 3072
_ONE_CHUNK_BYTES = 1 << 50

Run = Callable[[Any], "Tensor | None"]


def head_megakd(problem: Problem) -> Run:
    def run(inputs: HeadInputs) -> Tensor:
        num_tokens = inputs.hidden_TH.shape[0]
        each_T = torch.full((num_tokens,), 1 / num_tokens, device=problem.device)
        return head_loss(
            inputs.hidden_TH,
            inputs.weight_VH,
            inputs.labels_T,
            shard=problem.shard,
            lm_weight_T=LM * each_T,
            kd=[KD(KDTerm(), inputs.teacher, DISTIL * each_T)],
        ).loss

    return run


def head_products(problem: Problem) -> Run:
    """The four matrix products that any implementation needs, on whole tensors."""

    @torch.no_grad()
    def run(inputs: HeadInputs) -> None:
        logits_TV = inputs.hidden_TH @ inputs.weight_VH.t()
        torch.mm(inputs.teacher.hidden_TH, inputs.teacher.weight_vH.t(), out=logits_TV)
        logits_TV @ inputs.weight_VH
        logits_TV.t() @ inputs.hidden_TH

    return run


def head_unfused(problem: Problem) -> Run:
    """Whole logits, fp32 losses, autograd."""

    def run(inputs: HeadInputs) -> Tensor:
        student_TV = (inputs.hidden_TH @ inputs.weight_VH.t()).float()
        teacher_TV = (inputs.teacher.hidden_TH @ inputs.teacher.weight_vH.t()).float()
        log_q, log_p = student_TV.log_softmax(-1), teacher_TV.log_softmax(-1)
        kl = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
        return LM * functional.nll_loss(log_q, inputs.labels_T) + DISTIL * kl

    return run


def head_liger(problem: Problem, *, lm: float = LM, distil: float = DISTIL) -> Run:
    """liger-kernel's chunked fused linear loss, compiled; its JSD with beta 0 is forward KL."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=lm, weight_soft_loss=distil, beta=0.0, compiled=True)

    def run(inputs: HeadInputs) -> Tensor:
        teacher = inputs.teacher
        found: Tensor = loss(inputs.hidden_TH, inputs.weight_VH, teacher.hidden_TH, teacher.weight_vH, inputs.labels_T)
        return found

    return run


def head_liger_distil(problem: Problem) -> Run:
    """Liger's distillation without the LM loss: less work than ours does."""
    return head_liger(problem, lm=0.0, distil=1.0)


def dense_megakd(problem: Problem, **options: int) -> Run:
    def run(inputs: LogitInputs) -> Tensor:
        assert inputs.teacher_Tv is not None
        return _ours(problem, inputs, KD(KDTerm(), LogitTargets(inputs.teacher_Tv), _each(problem)), **options)

    return run


def dense_megakd_one_chunk(problem: Problem) -> Run:
    """All tokens in one chunk: one collective."""
    return dense_megakd(problem, chunk_bytes=_ONE_CHUNK_BYTES)


def sparse_megakd(problem: Problem) -> Run:
    def run(inputs: LogitInputs) -> Tensor:
        return _ours(problem, inputs, KD(KDTerm(tail="ghost"), inputs.sparse, _each(problem)))

    return run


def _each(problem: Problem) -> Tensor:
    return torch.full((problem.tokens,), 1 / problem.tokens, device=problem.device)


def _ours(problem: Problem, inputs: LogitInputs, kd: KD, **options: int) -> Tensor:
    return logits_loss(
        inputs.logits(),
        inputs.labels_T,
        shard=problem.shard,
        lm_weight_T=torch.zeros_like(kd.weight_T),
        kd=[kd],
        inplace=True,
        **options,
    ).loss


def dense_copy(problem: Problem) -> Run:
    """Read both models' logits, write one."""

    def run(inputs: LogitInputs) -> None:
        torch.add(inputs.student_Tv, inputs.teacher_Tv, out=inputs.student_Tv)

    return run


def dense_naive(problem: Problem) -> Run:
    return lambda inputs: forward_kl(inputs.logits().float(), inputs.teacher_Tv.float())


def dense_compiled(problem: Problem) -> Run:
    compiled = torch.compile(lambda student_TV, teacher_TV: forward_kl(student_TV.float(), teacher_TV.float()))
    return lambda inputs: compiled(inputs.logits(), inputs.teacher_Tv)


def dense_modelopt(problem: Problem) -> Run:
    """nvidia-modelopt's loss for Megatron; split, the sum of its values over the group is left to the caller."""
    if problem.world > 1:
        _init_megatron(problem.world)
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    loss = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=problem.world, sequence_parallel=False))

    def run(inputs: LogitInputs) -> Tensor:
        values_BT, _, _ = loss(inputs.logits().unsqueeze(1), inputs.teacher_Tv.unsqueeze(1))
        own: Tensor = values_BT.mean()
        if problem.world > 1:
            dist.all_reduce(own.detach().clone())
        return own

    return run


def sparse_megatron(problem: Problem) -> Run:
    """megatron-core's loss on cached top-k log-probabilities, with its bucket for the rest."""
    topk_kl_div = _cached_logits_loss(problem.megatron_training).topk_kl_div

    def run(inputs: LogitInputs) -> Tensor:
        log_p, ids = inputs.sparse.log_probs_TK.unsqueeze(1), inputs.sparse.ids_TK.unsqueeze(1)
        found: Tensor = topk_kl_div(inputs.logits().unsqueeze(1), log_p, ids, 1, 0, None, True).mean()
        return found

    return run


def machine_copy(problem: Problem) -> Run:
    source = torch.ones(BANDWIDTH_ENTRIES, dtype=torch.bfloat16, device=problem.device)
    target = torch.zeros_like(source)

    def run(_: None) -> None:
        target.copy_(source)

    return run


def machine_matmul(problem: Problem) -> Run:
    left, right = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device=problem.device)
    product = torch.empty_like(left)

    def run(_: None) -> None:
        torch.mm(left, right, out=product)

    return run


def _init_megatron(world: int) -> None:
    from megakd import cpu

    if cpu.needed():
        cpu.install()
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)


def _cached_logits_loss(folder: str | None) -> ModuleType:
    """megatron.training's module with that loss, and stand-ins for its neighbours: they drag in all that a trainer
    requires, and the loss calls none of them."""
    for place in [folder] if folder else sys.path:
        package = Path(place) / "megatron" / "training" / "distillation"
        if (package / "cached_logits_loss.py").exists():
            break
    else:
        raise ImportError("no megatron.training.distillation (megatron-core 0.19), see --megatron-training")
    for name in ("megatron.training", "megatron.training.utils", "megatron.core.msc_utils"):
        sys.modules[name] = _Unused(name)
    distillation = ModuleType("megatron.training.distillation")
    distillation.__path__ = [str(package)]
    sys.modules[distillation.__name__] = distillation
    return importlib.import_module(f"{distillation.__name__}.cached_logits_loss")


class _Unused(ModuleType):
    """Stand-in for a module: has every name, and none may be used."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
