"""Exact match of the embedded model on held-out prompts: `python -m benchmarks.quality`.

The prompts come from `hack.embedded.corpus.held_out_suite`, whose items the training never saw.
They run through the project's engine at temperature 0; one token per step, unless `--threshold` is
given. Prints a table and, last, one line of JSON.
"""

import argparse
import json
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from benchmarks import sweep
from hack.embedded.corpus import held_out_suite
from hack.embedded.example import Example
from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest
from vdiff_kserve.models import (
    QUANTIZATIONS,
    choose_device,
    choose_dtype,
    load_decoder,
    load_tokenizer,
    with_end_of_turn,
)
from vdiff_kserve.sampler.params import DecodingParams

CHUNK = 64
BONUS_TASKS = ("three_digits",)


@dataclass
class Score:
    """Counts of one task."""

    prompts: int = 0
    right: int = 0
    tokens: int = 0
    forwards: int = 0
    misses: list[tuple[str, str]] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        return {
            "prompts": self.prompts,
            "exact_match": self.right / self.prompts,
            "tokens_per_forward": self.tokens / self.forwards,
        }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, default=EMBEDDED)
    parser.add_argument("--n", type=int, default=1000, help="number of prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    parser.add_argument("--max_tokens", type=int, default=192)
    parser.add_argument("--block_length", type=int, default=32)
    parser.add_argument("--threshold", type=float, help="commit every token at least this likely")
    parser.add_argument("--cache", choices=("none", "prefix", "dual"), default="none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the blocks' weights")
    parser.add_argument("--rows", type=int, default=32, help="prompts in one forward pass")
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    parser.add_argument(
        "--sweep", action="store_true", help="every policy, cache and threshold instead of one"
    )
    parser.add_argument(
        "--curves", nargs="+", metavar="CURVE", help="with --sweep: these beside exact decoding"
    )
    parser.add_argument("--picture", type=Path, help="with --sweep: draw the frontier here")
    parser.add_argument("--misses", type=int, default=0, help="wrong answers to show per task")
    return parser.parse_args()


@dataclass(frozen=True)
class Answering:
    """A loaded model that answers prompts.

    Attributes:
        end_ids: what ends an answer.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerFast
    end_ids: tuple[int, ...]


@contextmanager
def loaded(arguments: argparse.Namespace) -> Iterator[Answering]:
    """The model that the arguments name, until the block is left."""
    device = choose_device(arguments.device)
    decoder, spec = load_decoder(
        arguments.model_dir,
        device,
        choose_dtype(arguments.dtype, device),
        quantization=arguments.quantization,
    )
    tokenizer = load_tokenizer(arguments.model_dir)
    engine = Engine(decoder, spec, EngineConfig(max_num_seqs=arguments.rows, max_queue=CHUNK))
    engine.start()
    try:
        yield Answering(engine, tokenizer, with_end_of_turn(spec, tokenizer).end_token_ids)
    finally:
        engine.stop()


def run_suite(
    model: Answering,
    suite: list[Example],
    decoding: DecodingParams,
    max_tokens: int,
    title: str | None = None,
) -> dict[str, Score]:
    """Answer every prompt and compare it with its one right answer."""
    scores: dict[str, Score] = defaultdict(Score)
    with tqdm(total=len(suite), desc=title, unit="prompt") as progress:
        for start in range(0, len(suite), CHUNK):
            chunk = suite[start : start + CHUNK]
            requests = [
                GenerationRequest(
                    prompt_ids=tuple(
                        model.tokenizer.apply_chat_template(
                            [{"role": "user", "content": example.prompt}], return_dict=False
                        )
                    ),
                    max_tokens=max_tokens,
                    decoding=decoding,
                    end_token_ids=model.end_ids,
                )
                for example in chunk
            ]
            for example, result in zip(chunk, model.engine.generate(requests), strict=True):
                text = model.tokenizer.decode(result.token_ids, skip_special_tokens=True)
                score = scores[example.task]
                score.prompts += 1
                score.right += text == example.answer
                score.tokens += result.stats.completion_tokens
                score.forwards += result.stats.nfe
                if text != example.answer:
                    score.misses.append((example.prompt, text))
                progress.update()
    return scores


def total(scores: dict[str, Score]) -> Score:
    """All tasks together, without the bonus."""
    parts = [score for name, score in scores.items() if name not in BONUS_TASKS]
    return Score(
        sum(part.prompts for part in parts),
        sum(part.right for part in parts),
        sum(part.tokens for part in parts),
        sum(part.forwards for part in parts),
    )


def main() -> None:
    arguments = parse_arguments()
    suite = held_out_suite(arguments.n, arguments.seed)
    if arguments.sweep:
        chosen = sweep.trials(arguments.block_length)
        if arguments.curves:
            chosen = [t for t in chosen if t.curve in ("exact", *arguments.curves)]
        outcomes = sweep.run(arguments.model_dir, suite, arguments.max_tokens, chosen)
        sweep.report(outcomes, arguments.json, arguments.picture)
        return
    policy = "low_confidence" if arguments.threshold is None else "threshold"
    decoding = DecodingParams(
        policy=policy,
        block_length=arguments.block_length,
        threshold=arguments.threshold or 0.9,
        cache=arguments.cache,
    )
    started = time.monotonic()
    with loaded(arguments) as model:
        scores = run_suite(model, suite, decoding, arguments.max_tokens)
    scores["all"] = total(scores)
    print(f"{'task':14s} {'prompts':>7s} {'exact match':>12s} {'tokens/forward':>15s}")
    for name, score in scores.items():
        row = score.summary()
        print(
            f"{name:14s} {score.prompts:7d} {row['exact_match']:12.1%} "
            f"{row['tokens_per_forward']:15.2f}"
        )
        for prompt, text in score.misses[: arguments.misses]:
            print(f"    {prompt!r} -> {text!r}")
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.quality", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - started, 1),
        "threads": torch.get_num_threads(),
        "max_tokens": arguments.max_tokens,
        "block_length": arguments.block_length,
        "threshold": arguments.threshold,
        "cache": arguments.cache,
        "tasks": {name: score.summary() for name, score in scores.items()},
    }
    line = json.dumps(report)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
