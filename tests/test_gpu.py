"""What needs a CUDA device: the head there, and a whole step in either kind of layers, against the CPU's figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from runs import make_tree, write_dataset

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_head_equals_the_cpu() -> None:
    from megakd.losses.head import KD, KDTerm, VocabShard, head_loss
    from megakd.targets import DenseTargets

    torch.manual_seed(0)
    cpu = [torch.randn(67, 32), torch.randn(256, 32), torch.randn(67, 48), torch.randn(256, 48)]
    labels, weight = torch.randint(0, 251, (67,)), torch.full((67,), 0.5)
    results = []
    for device in ("cpu", "cuda"):
        hidden, output, teacher, head = (tensor.detach().to(device).requires_grad_() for tensor in cpu)
        result = head_loss(
            hidden,
            output,
            labels.to(device),
            shard=VocabShard(0, 256, 251, None),
            lm_weight_T=weight.to(device),
            kd=[KD(KDTerm(temperature=2.0), DenseTargets(teacher.detach(), head.detach()), weight.to(device))],
            implementation="reference",
        )
        result.loss.backward()
        results.append([tensor.detach().cpu() for tensor in (result.loss, hidden.grad, output.grad)])
    for one, other in zip(*results):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_a_run_learns_and_resumes(implementation: str, tmp_path: Path) -> None:
    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    data = write_dataset(tmp_path / "data", num_tokens=40000)
    tree = make_tree(
        data,
        training={"train_iters": 30},
        student={"hidden_size": 64, "bf16": True, "transformer_impl": implementation},
        checkpoint={"save": str(tmp_path / "run"), "save_interval": 15},
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "megakd", "train", "--config", str(tmp_path / "c.yaml")]
    assert subprocess.run([*command, "--exit-interval", "15"]).returncode == 75
    assert subprocess.run(command).returncode == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.5
