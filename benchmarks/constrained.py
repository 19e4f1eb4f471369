"""What a JSON schema costs: `python -m benchmarks.constrained`.

The embedded model's JSON prompts that its training never saw are answered twice, without a schema
and with the one that the right answer has: its keys, in their order, and their types. Prints, for
each decoding, how many answers are right either way, and the forward passes that the schema's
answers took over those of the free ones, for all prompts and for those whose two answers are the
same text. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hack.embedded.corpus import held_out_suite
from hack.embedded.example import Example
from vdiff_kserve.checkpoint import EMBEDDED
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest, GenerationResult, Grammars
from vdiff_kserve.models import (
    choose_device,
    choose_dtype,
    load_causal_decoder,
    load_decoder,
    load_tokenizer,
    with_end_of_turn,
)
from vdiff_kserve.openai.structured import json_grammar
from vdiff_kserve.sampler import DecodingParams

ROWS = 32
TYPES = {str: "string", int: "integer"}
DECODINGS = {
    "threshold 0.98": DecodingParams(policy="threshold", threshold=0.98),
    "threshold 0.9": DecodingParams(policy="threshold", threshold=0.9),
    "factor 1": DecodingParams(policy="factor", factor=1.0),
    "entropy_bound 0.1": DecodingParams(policy="entropy_bound", entropy_bound=0.1),
    "apd": DecodingParams(policy="apd"),
    "one token per step": DecodingParams(policy="low_confidence"),
}


@dataclass
class Outcome:
    """The answers to all prompts under one decoding.

    Attributes:
        ratio: forward passes with the schema over those without.
        same_ratio: the same of prompts whose two answers are the same text.
    """

    name: str
    prompts: int
    right: float
    right_with_schema: float
    valid: float
    passes: int
    passes_with_schema: int
    same: int
    same_passes: int
    same_passes_with_schema: int

    @property
    def ratio(self) -> float:
        return self.passes_with_schema / self.passes

    @property
    def same_ratio(self) -> float:
        return self.same_passes_with_schema / self.same_passes if self.same_passes else 0.0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="prompts to choose the JSON ones from")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    parser.add_argument("--max_tokens", type=int, default=96)
    parser.add_argument("--decodings", nargs="+", choices=DECODINGS, default=list(DECODINGS))
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    return parser.parse_args(argv)


def schema_of(answer: str) -> dict[str, Any]:
    """What the right answer looks like."""
    fields = json.loads(answer)
    return {
        "type": "object",
        "properties": {name: {"type": TYPES[type(value)]} for name, value in fields.items()},
        "required": list(fields),
        "additionalProperties": False,
    }


def is_valid(text: str, answer: str) -> bool:
    """Whether a text is JSON with the keys and types of the right answer."""
    try:
        given = json.loads(text)
    except ValueError:
        return False
    types = {name: type(value) for name, value in json.loads(answer).items()}
    return isinstance(given, dict) and {name: type(v) for name, v in given.items()} == types


def measure(arguments: argparse.Namespace) -> list[Outcome]:
    """Answer every prompt under every decoding, with and without its schema."""
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    decoder, spec = load_decoder(EMBEDDED, device, dtype)
    tokenizer = load_tokenizer(EMBEDDED)
    spec = with_end_of_turn(spec, tokenizer)
    auxiliary = load_causal_decoder(EMBEDDED / "apd", device, dtype)
    ends = spec.end_token_ids
    grammars = Grammars(tokenizer, spec.decoder.vocab_size, ends, spec.max_model_len)
    suite = [each for each in held_out_suite(arguments.n, arguments.seed) if each.task == "json"]
    config = EngineConfig(max_num_seqs=ROWS, max_queue=2 * len(suite))
    engine = Engine(decoder, spec, config, auxiliary, grammars)
    engine.start()
    try:
        return [
            _outcome(name, engine, tokenizer, suite, arguments.max_tokens)
            for name in tqdm(arguments.decodings, unit="decoding")
        ]
    finally:
        engine.stop()


def _outcome(
    name: str,
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    suite: Sequence[Example],
    max_tokens: int,
) -> Outcome:
    def requests(*, with_schema: bool) -> list[GenerationRequest]:
        return [
            GenerationRequest(
                prompt_ids=tuple(
                    tokenizer.apply_chat_template(
                        [{"role": "user", "content": example.prompt}], return_dict=False
                    )
                ),
                max_tokens=max_tokens,
                decoding=DECODINGS[name],
                end_token_ids=engine.spec.end_token_ids,
                grammar=json_grammar(schema_of(example.answer)) if with_schema else None,
            )
            for example in suite
        ]

    def texts(results: Sequence[GenerationResult]) -> list[str]:
        return [tokenizer.decode(each.token_ids, skip_special_tokens=True) for each in results]

    free = engine.generate(requests(with_schema=False))
    bound = engine.generate(requests(with_schema=True))
    free_texts, bound_texts = texts(free), texts(bound)
    answers = [example.answer for example in suite]
    same = [i for i, text in enumerate(free_texts) if text == bound_texts[i]]
    valid = [is_valid(text, answer) for text, answer in zip(bound_texts, answers, strict=True)]
    return Outcome(
        name=name,
        prompts=len(suite),
        right=_share(free_texts, answers),
        right_with_schema=_share(bound_texts, answers),
        valid=sum(valid) / len(valid),
        passes=sum(each.stats.nfe for each in free),
        passes_with_schema=sum(each.stats.nfe for each in bound),
        same=len(same),
        same_passes=sum(free[i].stats.nfe for i in same),
        same_passes_with_schema=sum(bound[i].stats.nfe for i in same),
    )


def _share(texts: Sequence[str], answers: Sequence[str]) -> float:
    return sum(map(str.__eq__, texts, answers)) / len(answers)


def main() -> None:
    arguments = parse_arguments()
    outcomes = measure(arguments)
    print(
        f"{'decoding':20s} {'prompts':>7s} {'right':>7s} {'with schema':>11s} {'valid':>7s} "
        f"{'passes':>7s} {'with schema':>11s} {'ratio':>6s} {'same text':>9s} {'ratio':>6s}"
    )
    for each in outcomes:
        print(
            f"{each.name:20s} {each.prompts:7d} {each.right:7.1%} {each.right_with_schema:11.1%} "
            f"{each.valid:7.1%} {each.passes:7d} {each.passes_with_schema:11d} {each.ratio:6.2f} "
            f"{each.same:9d} {each.same_ratio:6.2f}"
        )
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.constrained", *sys.argv[1:]]),
        "decodings": [
            vars(each) | {"ratio": each.ratio, "same_ratio": each.same_ratio} for each in outcomes
        ],
    }
    line = json.dumps(report)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
