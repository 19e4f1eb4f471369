"""Task accuracy judged by somebody else: reasoning-gym's generators and verifiers.

    python -m benchmarks.reasoning

The items and the scores are reasoning-gym's; the prompts are short ones of our own, since the
embedded model is small. An item counts as solved when the verifier scores the final answer 1.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym
from tqdm import tqdm

from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest
from vdiff_kserve.models import (
    choose_device,
    choose_dtype,
    load_decoder,
    load_tokenizer,
    with_end_of_turn,
)
from vdiff_kserve.sampler import DecodingParams

ROWS = 32
Metadata = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One generator.

    Attributes:
        dataset: reasoning-gym's name of it.
        options: how large its items are.
        prompt: an item's metadata -> what the model is asked.
        final: the model's text -> the answer in the verifier's form; None when there is none.
    """

    dataset: str
    options: dict[str, Any]
    prompt: Callable[[Metadata], str]
    final: Callable[[str], str | None]


def _last_number(text: str) -> str | None:
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else None


def _last_list(text: str) -> str | None:
    found = re.search(r"Sorted: ([\d, ]+)", text)
    return None if found is None else str(re.findall(r"\d+", found.group(1)))


def _last_word(text: str) -> str | None:
    words = re.findall(r"\w+", text)
    return words[-1] if words else None


def _times(text: str) -> str | None:
    if text.endswith("once."):
        return "1"
    return _last_number(text)


TASKS = (
    Task(
        "chain_sum",
        {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        lambda item: f"What is {item['expression']}?",
        _last_number,
    ),
    Task(
        "number_sorting",
        {
            "min_numbers": 3,
            "max_numbers": 5,
            "min_decimals": 0,
            "max_decimals": 0,
            "min_value": 1,
            "max_value": 99,
        },
        lambda item: (
            f"Sort these numbers from largest to smallest: {', '.join(item['original_numbers'])}"
            if item["direction"] == "descending"
            else f"Sort these numbers: {', '.join(item['original_numbers'])}"
        ),
        _last_list,
    ),
    Task(
        "spell_backward",
        {"min_word_len": 3, "max_word_len": 7},
        lambda item: f"Spell {item['word']} backwards.",
        _last_word,
    ),
    Task(
        "letter_counting",
        {"min_words": 1, "max_words": 1},
        lambda item: (
            f"How many times does the letter {item['target_letter']} appear in {item['span'][0]}?"
        ),
        _times,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, default=EMBEDDED)
    parser.add_argument("--n", type=int, default=100, help="items per task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--threshold", type=float, help="decode by confidence")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    device = choose_device("auto")
    decoder, spec = load_decoder(args.model_dir, device, choose_dtype("auto", device))
    tokenizer = load_tokenizer(args.model_dir)
    ends = with_end_of_turn(spec, tokenizer).end_token_ids
    decoding = DecodingParams(block_length=spec.block_length)
    if args.threshold is not None:
        decoding = DecodingParams(
            policy="threshold", threshold=args.threshold, block_length=spec.block_length
        )
    engine = Engine(decoder, spec, EngineConfig(max_num_seqs=ROWS, max_queue=args.n))
    engine.start()
    figures: dict[str, dict[str, float]] = {}
    for task in tqdm(TASKS, unit="task"):
        dataset = reasoning_gym.create_dataset(
            task.dataset, size=args.n, seed=args.seed, **task.options
        )
        items = list(dataset)
        requests = [
            GenerationRequest(
                tuple(
                    tokenizer.apply_chat_template(
                        [{"role": "user", "content": task.prompt(item["metadata"])}],
                        return_dict=False,
                    )
                ),
                args.max_tokens,
                decoding,
                ends,
            )
            for item in items
        ]
        results = engine.generate(requests)
        texts = [tokenizer.decode(r.token_ids, skip_special_tokens=True) for r in results]
        scores = [
            dataset.score_answer(task.final(text), entry=item)
            for item, text in zip(items, texts, strict=True)
        ]
        figures[task.dataset] = {
            "items": len(items),
            "solved": sum(score == 1.0 for score in scores) / len(items),
            "tokens_per_forward": sum(r.stats.completion_tokens for r in results)
            / sum(r.stats.nfe for r in results),
        }
    engine.stop()
    print(f"\n{'reasoning-gym task':<20} {'items':>6} {'solved':>8} {'tokens/forward':>15}")
    for name, row in figures.items():
        print(
            f"{name:<20} {row['items']:6.0f} {row['solved']:8.1%} {row['tokens_per_forward']:15.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
