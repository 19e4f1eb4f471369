"""The diffusion model: its size, how it is trained and where it is written."""

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from hack.embedded.checkpoint import MAX_LENGTH, decoder_config, save_llada
from hack.embedded.corpus import TrainingStream
from hack.embedded.objective import Batch, batches
from hack.embedded.training import Trainer, initialize
from vdiff_kserve.models.batch import ForwardBatch
from vdiff_kserve.models.decoder import Decoder

HIDDEN_SIZE = 256
NUM_LAYERS = 4
NUM_HEADS = 8
INTERMEDIATE_SIZE = 512


def diffusion_trainer(
    tokenizer: Tokenizer, folder: Path, device: str, seed: int, batch_tokens: int
) -> Trainer:
    """A trainer of the LLaDA-format model with masked diffusion over the answers."""
    config = decoder_config(
        tokenizer.get_vocab_size(), HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, INTERMEDIATE_SIZE
    )
    model = Decoder(config)
    initialize(model, NUM_LAYERS, seed)

    def logits(canvas: Tensor, selected: Tensor) -> Tensor:
        return model.logits(model(ForwardBatch.dense(canvas))[selected])

    def source(stream: TrainingStream, rng: random.Random) -> Iterator[Batch]:
        return batches(stream, tokenizer, rng, batch_tokens, MAX_LENGTH)

    return Trainer(model, logits, source, folder / "checkpoint.pt", device, seed)


def export_diffusion(trainer: Trainer, tokenizer: Tokenizer, out: Path) -> None:
    """Write the averaged weights to the folder that ships."""
    model = trainer.model
    assert isinstance(model, Decoder)
    save_llada(out, model.config, trainer.ema, tokenizer)
