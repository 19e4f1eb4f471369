"""What the engine asks of a model, whoever computes it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vdiff_kserve.models.batch import ForwardBatch
from vdiff_kserve.models.decoder import DecoderConfig
from vdiff_kserve.models.sharding import VocabShard


class ForwardPass(Protocol):
    """A forward pass that may stop between its stages.

    Attributes:
        layers_left: stages still to run.
    """

    layers_left: int

    def advance(self, layers: int) -> None:
        """Run the next `layers` stages, or as many as are left."""

    @property
    def outputs(self) -> Tensor:
        """[outputs, ...], what `logits` takes, once no stage is left."""


class LanguageModel(Protocol):
    """A model over packed rows that keeps its keys and values in the batch's store."""

    @property
    def config(self) -> DecoderConfig:
        """Its sizes."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def stages(self) -> int:
        """How many stages a pass has."""

    @property
    def vocab_shard(self) -> VocabShard | None:
        """The part of the vocabulary that this rank's head is for; None when it is all."""

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """A whole pass: [outputs, ...], what `logits` takes, rows end to end."""

    def begin(self, batch: ForwardBatch) -> ForwardPass:
        """A pass of which no stage has run."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[positions, ...] -> [positions, vocab]."""

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Those of the tokens that this rank's head is for."""


@runtime_checkable
class RenoisingModel(LanguageModel, Protocol):
    """A model that is denoised from random tokens: calling it reads texts into the store."""

    def denoise(self, batch: ForwardBatch, soft: Tensor | None) -> Tensor:
        """Hidden states of the rows' canvases, [tokens, hidden_size].

        Args:
            batch: the canvases are the spans' query tokens; the store has what lies before them.
            soft: what `soften` gave for the rows' steps before, [tokens, hidden_size]; zeros for a
                canvas's first. None is zeros for all.
        """

    def soften(self, logits: Tensor) -> Tensor:
        """What the next step is conditioned on: [positions, vocab] -> [positions, hidden_size]."""
