"""Fitting a proxy: a small model tuned, by squared error, to the difference of two models' scores.

The recipe is that of MiniPLM's appendix E (arXiv 2410.17215), of which no code is public: the reference model with a
linear head over the mean of its last hidden states, both tuned on a random subset; its values then stand for the
differences.

The samples of an update are a function of the settings and its number, so that any number of ranks, and a run that
continues, fit the same proxy up to the order of sums. Axes: S sequence, B microbatch.
"""

from __future__ import annotations

import math
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megakd.artefacts.manifest import Manifest, atomic_write
from megakd.artefacts.run_lock import RunLock
from megakd.config.tree import dump
from megakd.data.blend import Blend
from megakd.data.loader import Loader, Microbatch
from megakd.data.order import permute
from megakd.errors import CorruptError, ExitStatus
from megakd.model.checkpoint.load import load_training_state, load_weights
from megakd.model.checkpoint.record import TRACKER, checkpoint_path, read_record
from megakd.model.checkpoint.save import CheckpointWriter, record_parameters
from megakd.model.checkpoint.tensor_names import check_weights
from megakd.model.gpt import build_model
from megakd.model.proxy.artefact import read_proxy, write_proxy
from megakd.model.proxy.head import ValueHead
from megakd.model.proxy.tuner import ValueTuner
from megakd.parallel import Groups, init_parallel
from megakd.pipeline.frozen.batches import plan_microbatches, read_microbatch
from megakd.pipeline.proxy.figures import Values, describe, draw, fit_line, table
from megakd.pipeline.proxy.preflight import ProxyConfig, ProxyPlan, steps_an_epoch
from megakd.work.console import tell
from megakd.work.progress import Progress, clock
from megakd.work.stop import StopFlag

PLOT = "predicted.png"


def fit(config: ProxyConfig, plan: ProxyPlan) -> ExitStatus:
    """Fit the proxy, or go on with it. All ranks call it. Returns COMPLETE, or STOPPED if a signal came first.

    Raises CorruptError where a gradient is not finite, UsageError where another run fits in the same folder.
    """
    groups = init_parallel(config.parallel(), seed=config.seed)
    folder = Path(config.output)
    if plan.finished is not None:
        _report(groups, folder, plan.finished, "finished already")
        _tidy(groups, folder, plan.finished)
        return ExitStatus.COMPLETE
    with ExitStack() as stack:
        if groups.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(RunLock(folder / "proxy.lock"))
            atomic_write(folder / "config.yaml", dump(config).encode())
        stop = stack.enter_context(StopFlag())
        run = _Fit(config, plan, groups)
        while not run.ended:
            asked = run.update(stop=stop.is_set())
            at_end = run.step % run.steps == 0
            if at_end:
                run.judge_epoch()
            if at_end or asked or (config.save_interval and run.step % config.save_interval == 0):
                run.save()
            if asked and not run.ended:
                run.say(f"stopped after update {run.step} as asked; the same command continues from here")
                return ExitStatus.STOPPED
        manifest = run.finish()
        _report(groups, folder, manifest, "done")
        _tidy(groups, folder, manifest)
    return ExitStatus.COMPLETE


class _Fit:
    """A fit in progress: weights, number of updates, held-out errors of the epochs, and progress lines."""

    def __init__(self, config: ProxyConfig, plan: ProxyPlan, groups: Groups) -> None:
        self._config, self._plan, self._groups = config, plan, groups
        self._writer = CheckpointWriter(config.output, background=False)
        self._mean, self._std = float(plan.trained.difference.mean()), float(plan.trained.difference.std())
        self._loader = Loader(
            Blend([plan.samples], None, seed=0),
            seq_length=plan.samples.seq_length,
            micro_batch_size=1,
            global_batch_size=1,
            eod_token=plan.eod_token,
            eod_mask_loss=plan.mask_policy != "all",
            vocab_size=plan.record.vocab_size,
        )
        self.steps = steps_an_epoch(plan)
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._tuner = self._build()
        if plan.resume is not None:
            load_training_state(plan.resume, [self._tuner.model], self._tuner, groups)
            self.step, self.history = plan.resume.iteration, list(plan.resume.loader_state["history"])
        trained, held_out = len(plan.trained.ids), len(plan.held_out.ids)
        self.say(
            f"{trained} samples to train on, {held_out} to judge by; {self.steps} updates an epoch, at most "
            f"{config.epochs} epochs; {groups.world_size} ranks on {groups.device.type}"
            + (f"; continues after update {self.step}" if self.step else "")
        )
        self._progress = Progress(self.steps * config.epochs, done=self.step, interval=config.log_interval)
        self._tokens = 0

    @property
    def best(self) -> dict[str, float]:
        """The epoch with the least held-out error; the first of equal ones."""
        return min(self.history, key=lambda epoch: epoch["held_out_error"])

    @property
    def ended(self) -> bool:
        """True if all epochs are done, or the last ``patience`` were no better than an earlier one."""
        done = len(self.history)
        return done == self._config.epochs or (done > 0 and done - self.best["epoch"] >= self._config.patience)

    def say(self, text: str) -> None:
        """Print a line on stderr, from the first rank."""
        if self._groups.rank == 0:
            tell(text)

    def update(self, *, stop: bool) -> bool:
        """Make the next update. Return whether any rank was asked to stop."""
        epoch, place = divmod(self.step, self.steps)
        size = self._config.global_batch_size
        trained = self._plan.trained
        places = np.arange(place * size, min((place + 1) * size, len(trained.ids)))
        picked = permute(places, num_samples=len(trained.ids), seed=self._config.seed, epoch=epoch)
        wanted = dict(zip(trained.ids[picked].tolist(), self._standardised(trained.difference[picked]).tolist()))
        error = 0.0
        for microbatch in self._microbatches(trained.ids[picked]):
            targets_B = [wanted[sample] for sample in microbatch.sample_ids_B.tolist()]
            value_B = self._values(microbatch)
            errors_B = (value_B - torch.tensor(targets_B, dtype=torch.float32, device=self._groups.device)) ** 2
            loss = errors_B.sum() / len(picked)
            loss.backward()  # type: ignore[no-untyped-call]
            error += float(loss.detach())
        self.step += 1
        norm = self._tuner.step(self._learning_rate())
        if not math.isfinite(norm):
            raise CorruptError(
                f"update {self.step}: the gradient is not finite; it was not applied. Try a smaller --lr, or another "
                f"model; samples {trained.ids[picked][:8].tolist()}"
            )
        sums = torch.tensor([error, float(stop)], dtype=torch.float64, device=self._groups.device)
        dist.all_reduce(sums)
        self._tokens += int((self._plan.samples.lengths(trained.ids[picked]) - 1).sum())
        self._show(float(sums[0]))
        return bool(sums[1] > 0)

    def judge_epoch(self) -> None:
        """Add the epoch that has just ended to the history."""
        true = self._plan.held_out.difference
        error = float((((self._predict() - true) / self._std) ** 2).mean())
        self.history.append({"epoch": len(self.history) + 1, "iteration": self.step, "held_out_error": error})
        constant = float((self._standardised(true) ** 2).mean())
        self.say(f"epoch {len(self.history)}: held-out error {error:.4f} of {constant:.4f} that a constant has")

    def save(self) -> None:
        """Save a checkpoint to go on from, and remove all others but the best epoch's. All ranks call it."""
        plan = self._plan
        self._writer.save(
            self.step,
            [self._tuner.model],
            self._tuner,
            self._groups,
            parameters=record_parameters(
                plan.record.shape,
                self._groups,
                iteration=self.step,
                vocab_size=plan.record.vocab_size,
                seq_length=plan.samples.seq_length,
                loader_state={"fit": plan.identity, "history": self.history},
                objective_state={},
            ),
            parents=plan.parents,
            tokenizer=plan.tokenizer,
        )
        kept = {self.step, *([int(self.best["iteration"])] if self.history else [])}
        _remove_others(self._groups, Path(self._config.output), kept)

    def finish(self) -> Manifest:
        """Load the best epoch, judge it, and write the proxy. All ranks call it."""
        config, plan, folder = self._config, self._plan, Path(self._config.output)
        record = read_record(folder, int(self.best["iteration"]), role="--output")
        if record.iteration != self.step:
            load_training_state(record, [self._tuner.model], self._tuner, self._groups)
        predicted = self._predict()
        line = fit_line(plan.trained.reference_nll, plan.trained.difference)
        by_reference = line[0] + line[1] * plan.held_out.reference_nll
        true = plan.held_out.difference
        figures = describe(true, {"proxy": predicted, "reference NLL alone": by_reference}, ratio=config.ratio)
        if self._groups.rank == 0:
            atomic_write(folder / PLOT, draw(true, predicted))
            write_proxy(
                folder,
                self._head(),
                {
                    "sample_id": plan.held_out.ids,
                    "difference": true,
                    "predicted": predicted,
                    "reference_nll": plan.held_out.reference_nll,
                },
                record=record,
                parameters={
                    "packing": plan.samples.packing,
                    "mask_policy": plan.mask_policy,
                    "num_trained": len(plan.trained.ids),
                    "num_held_out": len(plan.held_out.ids),
                    "fit": plan.settings,
                    "history": self.history,
                    "figures": figures,
                },
                parents=plan.parents,
            )
        dist.barrier()
        return read_proxy(folder).manifest

    def _build(self) -> ValueTuner:
        config, plan, groups = self._config, self._plan, self._groups
        check_weights(plan.record.path, plan.record.shape, "--load")
        chunks = build_model(plan.shape, groups, vocab_size=plan.record.vocab_size, seq_length=plan.samples.seq_length)
        if plan.resume is None:
            load_weights(plan.record, chunks, groups)
        head = ValueHead(plan.shape.hidden_size, device=groups.device)
        return ValueTuner(chunks[0], head, groups, weight_decay=config.weight_decay, clip_grad=config.clip_grad)

    def _microbatches(self, ids: NDArray[np.int64]) -> list[Microbatch]:
        """This rank's microbatches of the samples. Microbatches are the same for any number of ranks."""
        plans = plan_microbatches(
            self._plan.samples.lengths(ids),
            micro_batch_size=self._config.micro_batch_size,
            seq_length=self._plan.samples.seq_length,
        )
        mine = plans[self._groups.data_rank :: self._groups.data_size]
        return [read_microbatch(self._loader, ids[plan.places], plan.width) for plan in mine]

    def _values(self, microbatch: Microbatch) -> torch.Tensor:
        """``[B]`` fp32: standardised predictions."""
        device = self._groups.device
        tokens_BS = torch.from_numpy(microbatch.tokens_BS).to(device)
        return self._tuner.values(tokens_BS, torch.from_numpy(microbatch.loss_mask_BS).to(device))

    @torch.no_grad()
    def _predict(self) -> Values:
        """``[held out]`` float64: the predicted difference of each held-out sample, nats a token. All ranks call it."""
        ids = self._plan.held_out.ids
        values = torch.zeros(len(ids), dtype=torch.float64, device=self._groups.device)
        for microbatch in self._microbatches(ids):
            places = torch.from_numpy(np.searchsorted(ids, microbatch.sample_ids_B)).to(values.device)
            values[places] = self._values(microbatch).double()
        dist.all_reduce(values)
        predicted: Values = self._mean + self._std * values.cpu().numpy()
        return predicted

    def _head(self) -> Values:
        """``[H + 1]`` float64: weights and bias of a head that predicts nats a token, not standardised."""
        head = self._tuner.head
        weight, bias = (p.detach().double().cpu().numpy() * self._std for p in (head.weight, head.bias))
        return np.concatenate([weight, bias + self._mean])

    def _standardised(self, difference: Values) -> Values:
        return (difference - self._mean) / self._std

    def _learning_rate(self) -> float:
        """Learning rate: linear warm-up over the first share of all updates, then linear to 0 at their end."""
        total = self.steps * self._config.epochs
        warmup = max(1, round(self._config.warmup_fraction * total))
        if self.step <= warmup:
            return self._config.lr * self.step / warmup
        return self._config.lr * (total + 1 - self.step) / (total + 1 - warmup)

    def _show(self, error: float) -> None:
        progress = self._progress
        progress.done = self.step
        if progress.is_due():
            epoch, place = divmod(self.step - 1, self.steps)
            self.say(
                f"epoch {epoch + 1} of {self._config.epochs}, update {place + 1} of {self.steps}: error {error:.4f}, "
                f"{self._tokens / progress.seconds:.0f} tokens/s, {clock(progress.seconds_left)} left"
            )


def _report(groups: Groups, folder: Path, manifest: Manifest, state: str) -> None:
    if groups.rank == 0:
        parameters = manifest.parameters
        tell(
            f"{folder}: {state}; {parameters['num_held_out']} held-out samples, as predicted and in truth:", on="stdout"
        )
        tell(table(parameters["figures"], ratio=parameters["fit"]["ratio"]), on="stdout")
        tell(f"fingerprint {manifest.fingerprint}", on="stdout")


def _tidy(groups: Groups, folder: Path, manifest: Manifest) -> None:
    """Remove all checkpoints but the proxy's, and record that one as the latest."""
    iteration = int(manifest.parameters["iteration"])
    if groups.rank == 0:
        atomic_write(folder / TRACKER, f"{iteration}\n".encode())
    _remove_others(groups, folder, {iteration})


def _remove_others(groups: Groups, folder: Path, kept: set[int]) -> None:
    """Remove the fit's checkpoints, finished or not, except those of the iterations ``kept``."""
    if groups.rank == 0:
        names = {checkpoint_path(folder, iteration).name for iteration in kept}
        for path in folder.glob("iter_*"):
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)
    dist.barrier()
