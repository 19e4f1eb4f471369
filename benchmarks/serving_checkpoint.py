"""A random checkpoint in LLaDA's format, of any size, for measuring speed.

    python -m benchmarks.serving_checkpoint 32x4096x126464 DIR      LLaDA-8B's shape, 16 GB

The weights are drawn on the GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from benchmarks.speed import SPEC
from vdiff_kserve.models import (
    Decoder,
    DecoderConfig,
    ModelSpec,
    choose_device,
    load_tokenizer,
)
from vdiff_kserve.models.checkpoint_config import CheckpointConfig
from vdiff_kserve.models.registry import FAMILIES, find_by_architecture

ARCHITECTURE = "LLaDAModelLM"
HEAD_DIM, WIDE_HEAD_DIM = 64, 128
WIDE = 2048
"""Width from which on heads are wide, as in published models."""
CONTEXT = 2304
STD, STD_WIDTH = 0.06, 512
"""Of the weights, up to this width. Those of wider models are smaller, so that their products have
the same size."""
SHARD_BYTES = 1 << 30
WRITERS = 4
"""Files written at once, each from memory."""
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SIZES = re.compile(r"(\d+)x(\d+)x(\d+)")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def parse_sizes(text: str) -> DecoderConfig:
    """`12x512x8192` as a decoder of 12 layers, width 512 and 8192 tokens.

    The rest is as in `benchmarks.speed`: heads of 64 (of 128 from a width of 2048 on), the MLP
    three times as wide as the model. `32x4096x126464` is LLaDA-8B.

    Raises:
        ValueError: the text has another form, or the width is no multiple of a head's.
    """
    found = SIZES.fullmatch(text)
    if found is None:
        raise ValueError(f"sizes must look like 12x512x8192, got {text!r}")
    layers, width, vocabulary = (int(size) for size in found.groups())
    head = WIDE_HEAD_DIM if width >= WIDE else HEAD_DIM
    if width % head or not layers or not width or vocabulary < 8:
        raise ValueError(f"the width must be a multiple of {head}, got {text!r}")
    heads = width // head
    return replace(
        SPEC.decoder,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head,
    )


def write_random_checkpoint(
    folder: Path,
    config: DecoderConfig,
    seed: int = 0,
    device: torch.device | str = "cpu",
    context: int = CONTEXT,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write weights in bfloat16, `config.json` and a tokenizer into `folder`.

    The last two tokens are the mask and the end of text; every other one is a word of its own.

    Args:
        device: where the weights are drawn.
        context: most tokens of prompt and answer together.
        shard_bytes: about how large a file of weights becomes; smaller models are in one.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    names = FAMILIES[ARCHITECTURE].tensor_names
    shapes = {names.published_name(name): p.shape for name, p in decoder.named_parameters()}
    std = STD * min(1, math.sqrt(STD_WIDTH / config.hidden_size))
    generator = torch.Generator(device).manual_seed(seed)

    def draw(names: Iterable[str]) -> dict[str, torch.Tensor]:
        tensors = {}
        for name in names:
            weight = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
            if weight.dim() > 1:
                weight.normal_(std=std, generator=generator)
            tensors[name] = weight.cpu()
        return tensors

    _write_shards(folder, list(_shards(shapes, shard_bytes)), draw)
    text = json.dumps(_fields(config) | {"max_sequence_length": context})
    (folder / "config.json").write_text(text, encoding="utf-8")
    _tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def _shards(shapes: Mapping[str, torch.Size], shard_bytes: int) -> Iterator[list[str]]:
    """The tensors' names, in files of about that size each."""
    shard: list[str] = []
    size = 0
    for name, shape in shapes.items():
        shard.append(name)
        size += shape.numel() * torch.bfloat16.itemsize
        if size >= shard_bytes:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _write_shards(
    folder: Path,
    shards: Sequence[Sequence[str]],
    draw: Callable[[Iterable[str]], dict[str, torch.Tensor]],
) -> None:
    """Draw and save the tensors of all files, several at once, and the index of several."""
    if len(shards) == 1:
        save_file(draw(shards[0]), folder / SINGLE_FILE)
        return
    files = {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": s for i, s in enumerate(shards)}
    saving: deque[Future[None]] = deque()
    with ThreadPoolExecutor(WRITERS) as pool:
        for file, names in tqdm(files.items(), desc="Writing weights", unit="file"):
            if len(saving) == WRITERS:
                saving.popleft().result()
            saving.append(pool.submit(save_file, draw(names), folder / file))
        for each in saving:
            each.result()
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def _fields(config: DecoderConfig) -> dict[str, object]:
    return {
        "architectures": [ARCHITECTURE],
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "block_type": "llama",
        "d_model": config.hidden_size,
        "embedding_size": config.vocab_size,
        "eos_token_id": config.vocab_size - 1,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "mask_token_id": config.vocab_size - 2,
        "max_sequence_length": CONTEXT,
        "mlp_hidden_size": config.intermediate_size,
        "model_type": "llada",
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "n_layers": config.num_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "rope": True,
        "rope_full_precision": config.rope_in_float32,
        "rope_theta": config.rope_theta,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "vocab_size": config.vocab_size,
        "weight_tying": config.tie_embeddings,
    }


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = [f"w{i}" for i in range(vocabulary - 2)]
    special = ["<|mdm_mask|>", "<|endoftext|>"]
    ids = {word: i for i, word in enumerate([*words, *special])}
    tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token=special[0], eos_token=special[1]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def read_checkpoint(folder: Path) -> tuple[ModelSpec, list[int]]:
    """What a checkpoint says of itself, and the token ids that make plain text.

    Raises:
        CheckpointError: the folder cannot be served.
    """
    config = CheckpointConfig.read(folder)
    spec = find_by_architecture(config, FAMILIES).read_spec(config)
    tokenizer = load_tokenizer(folder)
    special = {spec.mask_token_id, spec.eos_token_id, *tokenizer.all_special_ids}
    special |= tokenizer.added_tokens_decoder.keys()
    size = min(spec.decoder.vocab_size, len(tokenizer))
    return spec, [i for i in range(size) if i not in special]


def main(argv: Sequence[str] | None = None) -> None:
    """Write a checkpoint into a new folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("sizes", type=parse_sizes, metavar="LxWxV", help="layers, width and vocabulary")
    add("folder", type=Path)
    add("--context", type=int, default=CONTEXT, help="most tokens of prompt and answer together")
    add("--device", default="auto", help="where the weights are drawn")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True)
    device = choose_device(args.device)
    write_random_checkpoint(args.folder, args.sizes, device=device, context=args.context)


if __name__ == "__main__":
    main()
