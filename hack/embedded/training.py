"""The training loop of both models: schedule, optimizers, moving average, checkpoints."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from hack.embedded.corpus import BASE_WEIGHTS, TrainingStream
from hack.embedded.objective import Batch
from hack.embedded.peers import Peers

Logits = Callable[[Tensor, Tensor], Tensor]
"""(canvas [rows, length], flat indices [positions]) -> logits [positions, vocab]."""

Source = Callable[[TrainingStream, random.Random], Iterator[Batch]]
"""Examples and a generator for everything else that is random -> batches."""

MUON_LR = 1.5e-3
ADAM_LR = 1.5e-3
WARMUP_STEPS = 100
STABLE_SHARE = 0.4  # of the run, before the linear decay
FINAL_LR = 0.02
FULL_LEVEL_AT = 0.4  # share of the run after which the curriculum is complete
EMA_DECAY = 0.998
CHECKPOINT_SECONDS = 180.0
REWEIGHT_STEPS = 100
INTERVAL_STEPS = 10
BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}"
ACCURACY_DECAY = 0.98
SDPA_BACKENDS = {
    # On CPUs the backward pass of the fused attention kernel takes a third of a step.
    "cpu": [SDPBackend.MATH],
    "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


@dataclass
class Progress:
    """What a checkpoint remembers beside tensors; `history` holds (step, loss, accuracy)."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float, float]] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)  # rows right in all masked places


@dataclass(frozen=True)
class Limits:
    """When the run ends: after so many minutes of training or steps, whichever comes first."""

    minutes: float
    steps: int | None

    def done_share(self, progress: Progress) -> float:
        """Share of the run behind us, 0 to 1."""
        share = progress.seconds / (60 * self.minutes)
        return min(1.0, max(share, progress.step / self.steps if self.steps else 0.0))


def initialize(model: nn.Module, num_layers: int, seed: int) -> None:
    """Normal weights of 0.02; what writes to the residual stream starts smaller with depth."""
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * num_layers) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / depth if residual else 0.02
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def learning_rate(step: int, share: float) -> float:
    """Factor on the peak rates: warm-up, plateau, linear decay."""
    decay = min(1.0, (1.0 - share) / (1.0 - STABLE_SHARE))
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(FINAL_LR, decay)


def adapted_weights(accuracy: dict[str, float]) -> dict[str, float]:
    """Task weights that grow with a task's share of the errors."""
    errors = {task: 1.0 - accuracy.get(task, 0.5) for task in BASE_WEIGHTS}
    mean = sum(errors.values()) / len(errors) + 1e-6
    return {
        task: base * (0.3 + min(2.5, errors[task] / mean)) for task, base in BASE_WEIGHTS.items()
    }


class Trainer:
    """Owns a model's optimizers, the moving average of its weights and its checkpoint."""

    def __init__(
        self, model: nn.Module, logits: Logits, source: Source, path: Path, device: str, seed: int
    ) -> None:
        self.model = model.to(device)
        self.logits = logits
        self.source = source
        self.path = path
        self.device = torch.device(device)
        self.seed = seed
        self.progress = Progress()
        named = dict(self.model.named_parameters())
        hidden = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
        other = [p for name, p in named.items() if p.ndim != 2 or "embed" in name]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=MUON_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(other, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.peaks = (MUON_LR, ADAM_LR)
        self.ema = {name: p.detach().clone() for name, p in named.items()}

    def save(self) -> None:
        """Write the checkpoint; the old one stays until the new one is complete."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": vars(self.progress),
        }
        temporary = self.path.with_suffix(".partial")
        torch.save(state, temporary)
        temporary.rename(self.path)

    def resume(self) -> bool:
        """Continue from the checkpoint, if there is one."""
        if not self.path.is_file():
            return False
        state: dict[str, Any] = torch.load(self.path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema = state["ema"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        return True

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy of the selected positions, and which of them are right."""
        attention = sdpa_kernel(SDPA_BACKENDS[self.device.type])
        with attention, torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits = self.logits(batch.canvas.to(self.device), batch.selected.to(self.device))
        targets, weights = batch.targets.to(self.device), batch.weights.to(self.device)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return (losses * weights).sum() / weights.sum(), logits.argmax(-1) == targets

    def step(self, batch: Batch, share: float, peers: Peers) -> tuple[float, float]:
        """One update; returns the loss and the accuracy on the active blocks."""
        factor = learning_rate(self.progress.step, share)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        loss, right = self.loss(batch)
        loss.backward()
        peers.average_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average, current = list(self.ema.values()), [p.detach() for p in self.model.parameters()]
        decay = min(EMA_DECAY, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(average, current, 1.0 - decay)
        return loss.item(), self._track_accuracy(batch, right.cpu())

    def _track_accuracy(self, batch: Batch, right: Tensor) -> float:
        active = batch.weights == 1.0
        hits, rows = right[active].float(), batch.rows[active]
        count = torch.zeros(len(batch.tasks)).index_add_(0, rows, torch.ones_like(hits))
        correct = torch.zeros(len(batch.tasks)).index_add_(0, rows, hits)
        for task, n, c in zip(batch.tasks, count.tolist(), correct.tolist(), strict=True):
            if n:
                old = self.progress.accuracy.get(task, 0.0)
                new = float(n == c)
                self.progress.accuracy[task] = ACCURACY_DECAY * old + (1 - ACCURACY_DECAY) * new
        return hits.mean().item()

    def run(self, limits: Limits, peers: Peers) -> bool:
        """Train until `limits` or a signal to the first process; returns whether it is complete."""
        stopped: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _frame: stopped.append(received))
        first, progress = peers.rank == 0, self.progress
        seed = f"{self.seed}-{progress.step}-{peers.rank}"
        stream = TrainingStream(seed, weights=adapted_weights(progress.accuracy))
        source = self.source(stream, random.Random(f"masks-{seed}"))
        saved = time.monotonic()
        share = limits.done_share(progress)
        bar = tqdm(total=1.0, initial=share, bar_format=BAR_FORMAT, disable=not first)
        while True:
            share, stop = peers.agree(limits.done_share(progress), bool(stopped))
            if stop or share >= 1.0:
                break
            stream.level = min(1.0, share / FULL_LEVEL_AT)
            if progress.step % REWEIGHT_STEPS == 0:
                stream.weights = adapted_weights(progress.accuracy)
            started, first_token = time.monotonic(), progress.tokens
            self._interval(source, share, peers)
            seconds = time.monotonic() - started
            progress.seconds += seconds
            _, loss, accuracy = progress.history[-1]
            speed = (progress.tokens - first_token) / seconds
            bar.update(limits.done_share(progress) - bar.n)
            bar.set_description(f"step {progress.step}", refresh=False)
            bar.set_postfix_str(f"loss {loss:.4f} acc {accuracy:.4f} {speed:,.0f} tok/s")
            if first and progress.step % REWEIGHT_STEPS == 0:
                worst = sorted(progress.accuracy.items(), key=lambda item: item[1])
                tqdm.write(" ".join(f"{task} {value:.3f}" for task, value in worst))
            if first and time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
        bar.close()
        if first:
            self.save()
        return not stop

    def _interval(self, source: Iterator[Batch], share: float, peers: Peers) -> None:
        """Some steps and one entry of their mean loss and accuracy."""
        losses, hits = [], []
        for _ in range(INTERVAL_STEPS):
            batch = next(source)
            loss, accuracy = self.step(batch, share, peers)
            self.progress.step += 1
            self.progress.tokens += batch.canvas.numel() * peers.size
            losses.append(loss)
            hits.append(accuracy)
        self.progress.history.append(
            (self.progress.step, sum(losses) / len(losses), sum(hits) / len(hits))
        )
