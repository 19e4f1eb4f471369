"""A checkpoint for tests: the golden LLaDA weights with a byte-level tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.golden import GOLDEN_DIR

FIRST_SPECIAL_ID = 314
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|startoftext|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|mdm_mask|>",
    "<|eot_id|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """320 ids: the 256 bytes, 58 pairs of letters, and LLaDA's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "etaoinsh"
    merges = [(a, b) for a in letters for b in letters][: FIRST_SPECIAL_ID - len(alphabet)]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mdm_mask|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into `folder`."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN_DIR / "llada" / name, folder / name)
    make_tokenizer().save_pretrained(folder)
    return folder
