"""How well holes are filled, by their length: `python -m benchmarks.infilling`.

One gap each in sentences and sequences of the embedded model's task `fill_middle` that the training
never saw, in the model's chat form, with the rest of the answer given on both sides. Compared are
the right length, automatic lengths, and fixed wrong ones. Prints a table and, last, one line of
JSON.
"""

import argparse
import asyncio
import json
import random
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from hack.embedded.corpus import draw
from hack.embedded.example import Example
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.loading import LoadedModel, load_model
from vdiff_kserve.openai.protocol import Completion, CompletionRequest
from vdiff_kserve.openai.service import GenerationService

BLANK = re.compile(r"_{2,4}|\.\.\.")
LONGEST = 16
"""`max_tokens` of the hole when its length is automatic."""
TOO_LONG = (1, 3, 8)
"""Tokens by which the fixed wrong lengths are too long."""
IN_FLIGHT = 8


@dataclass(frozen=True)
class Gap:
    """A text with one hole.

    Attributes:
        prompt: token ids up to the hole.
        text: what belongs there; its length in tokens is `tokens`.
    """

    prompt: tuple[int, ...]
    text: str
    tokens: int
    suffix: str


@dataclass
class Score:
    """What one way of choosing the length came to."""

    right: int = 0
    passes: int = 0


def gap_of(example: Example, model: LoadedModel) -> Gap:
    """The hole of an example, whose prompt has a blank where the answer has a text."""
    blank = BLANK.search(example.prompt)
    assert blank is not None, example.prompt
    before, behind = example.prompt[: blank.start()], example.prompt[blank.end() :]
    answer = example.answer
    start = max(n for n in range(len(answer)) if before.endswith(answer[:n]))
    end = min(n for n in range(start + 1, len(answer) + 1) if behind.startswith(answer[n:]))
    while answer[start - 1] == " ":  # tokens begin with their space
        start -= 1
    tokenizer = model.tokenizer
    chat = [{"role": "user", "content": example.prompt}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    written = tokenizer.encode(answer[:start], add_special_tokens=False)
    text = answer[start:end]
    tokens = len(tokenizer.encode(text, add_special_tokens=False))
    return Gap((*prompt, *written), text, tokens, answer[end:])


def gaps(count: int, model: LoadedModel) -> list[Gap]:
    """Different held-out gaps that have text on both sides."""
    rng = random.Random("infilling")
    found: dict[str, Gap] = {}
    while len(found) < count:
        example = draw("fill_middle", rng, 1.0, held_out=True)
        gap = gap_of(example, model)
        if gap.suffix and gap.tokens <= LONGEST and "___" not in gap.text:
            found[example.prompt] = gap
    return list(found.values())


async def measure(
    service: GenerationService, items: Sequence[Gap], extra: int | None, threshold: float
) -> Score:
    """Fill all holes: with `extra` tokens more than the text has, or (None) automatic lengths."""
    score, places = Score(), asyncio.Semaphore(IN_FLIGHT)

    async def fill(gap: Gap) -> None:
        length = LONGEST if extra is None else gap.tokens + extra
        request = CompletionRequest(
            prompt=list(gap.prompt), suffix=gap.suffix, max_tokens=length, policy="threshold",
            threshold=threshold, temperature=0, infill_lengths=None if extra is None else [length],
        )  # fmt: skip
        async with places:
            answer = await service.respond(request)
        assert isinstance(answer, Completion)
        score.right += answer.choices[0].text == gap.text
        score.passes += answer.vdiff.nfe

    tasks = [asyncio.create_task(fill(gap)) for gap in items]
    for done in tqdm(asyncio.as_completed(tasks), total=len(tasks), unit="hole", leave=False):
        await done
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=200, help="number of holes")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    model = load_model(ServerConfig())
    service = GenerationService(model.engine, model.tokenizer, model.limits, "embedded")
    ways: dict[str, int | None] = {"the right length": 0, "automatic, up to 16 tokens": None}
    ways |= {f"{extra} too long": extra for extra in TOO_LONG}
    report = {}
    try:
        items = gaps(arguments.n, model)
        print(f"{'length of the hole':28s} {'exact match':>11s} {'passes per hole':>16s}")
        for name, extra in ways.items():
            score = asyncio.run(measure(service, items, extra, arguments.threshold))
            match, passes = score.right / len(items), score.passes / len(items)
            report[name] = {"exact_match": match, "passes": round(passes, 2)}
            print(f"{name:28s} {match:11.1%} {passes:16.1f}")
    finally:
        model.engine.stop()
    command = shlex.join(["python", "-m", "benchmarks.infilling", *sys.argv[1:]])
    line = json.dumps({"command": command, "holes": len(items), "lengths": report})
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
