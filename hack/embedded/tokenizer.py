"""The embedded model's tokenizer: byte-level, whole words of the templates, single digits and letters."""

import json
import random
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hack.embedded.corpus import TASKS, draw
from hack.embedded.words import CAPITALS, DAYS, MONTHS, NAMES

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
START_HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL_TOKENS = (BOS, EOS, "[CLS]", "[gMASK]", MASK, START_HEADER, END_HEADER, EOT)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first -%}{{ bos_token }}{%- endif -%}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}"
    "{{ '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)

SAMPLES_PER_TASK = 6000
MIN_COUNT = 24


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _vocabulary(seed: int) -> list[str]:
    """Whole words that occur often in prompts and answers; payload words are too rare to enter."""
    splitter = _pre_tokenizer()
    rng = random.Random(f"tokenizer-{seed}")
    counts: Counter[str] = Counter()
    for task in TASKS:
        for _ in range(SAMPLES_PER_TASK):
            example = draw(task, rng, 1.0, held_out=False)
            for text in (example.prompt, example.answer):
                counts.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    for name in (*NAMES, *CAPITALS, *CAPITALS.values(), *DAYS, *MONTHS):
        counts[name] += MIN_COUNT
        counts[f"Ġ{name}"] += MIN_COUNT
    for extra in ("ĊĊ", "system", "user", "assistant", "Ġpositive", "Ġnegative"):
        counts[extra] += MIN_COUNT
    return sorted(piece for piece, n in counts.items() if n >= MIN_COUNT and len(piece) > 1)


def build_tokenizer(seed: int = 0) -> Tokenizer:
    """Bytes first, then words, then the special tokens at the end of the vocabulary."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + _vocabulary(seed)
    padding = -(len(pieces) + len(SPECIAL_TOKENS)) % 64
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_token_{i}|>" for i in range(padding)]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in (*reserved, *SPECIAL_TOKENS)
        ]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for `transformers.AutoTokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "cls_token": "[CLS]",
        "eos_token": EOS,
        "gmask_token": "[gMASK]",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def chat_message(role: str, content: str) -> str:
    """One message under the chat template."""
    return f"{START_HEADER}{role}{END_HEADER}\n\n{content.strip()}{EOT}"


def chat_prompt(message: str) -> str:
    """The chat template rendered for one user message."""
    return f"{BOS}{chat_message('user', message)}{START_HEADER}assistant{END_HEADER}\n\n"
