"""The auxiliary causal model for adaptive parallel decoding: Qwen2 format, same tokenizer, same text."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from hack.embedded.checkpoint import MAX_LENGTH, READABLE, RMS_NORM_EPS, ROPE_THETA
from hack.embedded.corpus import TrainingStream
from hack.embedded.example import Example
from hack.embedded.objective import POOL, Batch, Row, RowEncoder
from hack.embedded.tokenizer import BOS, EOS, EOT
from hack.embedded.training import Trainer, initialize

HIDDEN_SIZE = 128
NUM_LAYERS = 3
NUM_HEADS = 4
INTERMEDIATE_SIZE = 352


def _config(tokenizer: Tokenizer) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=RMS_NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(EOS),
    )


def _next_token_batch(rows: list[Row], eos: int) -> Batch:
    """Rows padded with end tokens; the loss is on the answer, its end of turn and one end token."""
    length = max(row.length for row in rows)
    canvases, selected, targets, owners = [], [], [], []
    for index, row in enumerate(rows):
        ids = row.prompt + row.answer + row.suffix
        ids += [eos] * (length - len(ids))
        first = max(1, len(row.prompt))
        for position in range(first, row.length):
            selected.append(index * length + position - 1)
            targets.append(ids[position])
            owners.append(index)
        canvases.append(ids)
    return Batch(
        torch.tensor(canvases),
        torch.tensor(selected),
        torch.tensor(targets),
        torch.ones(len(targets)),
        torch.tensor(owners),
        tuple(row.task for row in rows),
    )


def _batches(
    examples: Iterable[Example], tokenizer: Tokenizer, rng: random.Random, budget: int
) -> Iterator[Batch]:
    encoder = RowEncoder(tokenizer, rng)
    eos = tokenizer.token_to_id(EOS)
    stream = iter(examples)
    while True:
        pool = sorted((encoder.encode(next(stream)) for _ in range(POOL)), key=lambda r: r.length)
        groups = []
        while pool:
            count = max(1, budget // pool[-1].length)
            groups.append(pool[-count:])
            del pool[-count:]
        rng.shuffle(groups)
        for rows in groups:
            yield _next_token_batch(rows, eos)


def causal_trainer(
    tokenizer: Tokenizer, folder: Path, device: str, seed: int, batch_tokens: int
) -> Trainer:
    """A trainer of the causal model by next-token prediction on the answers."""
    model = Qwen2ForCausalLM(_config(tokenizer))
    initialize(model, NUM_LAYERS, seed)

    def logits(canvas: Tensor, selected: Tensor) -> Tensor:
        hidden = model.model(input_ids=canvas, use_cache=False).last_hidden_state
        return model.lm_head(hidden.flatten(0, 1)[selected])

    def source(stream: TrainingStream, rng: random.Random) -> Iterator[Batch]:
        return _batches(stream, tokenizer, rng, batch_tokens)

    return Trainer(model, logits, source, folder / "causal.pt", device, seed)


def export_causal(trainer: Trainer, tokenizer: Tokenizer, out: Path) -> None:
    """Write the averaged weights as a Qwen2 checkpoint; the tokenizer is the parent folder's."""
    model = Qwen2ForCausalLM(_config(tokenizer))
    model.load_state_dict(trainer.ema, strict=False)
    model.tie_weights()
    eot, eos = tokenizer.token_to_id(EOT), tokenizer.token_to_id(EOS)
    model.generation_config.eos_token_id = [eot, eos]
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(READABLE)
