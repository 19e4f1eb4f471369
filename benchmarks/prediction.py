"""Forward passes that a predicted answer saves: `python -m benchmarks.prediction`.

Three edits of texts that the embedded model knows, on held-out prompts: a story about somebody
else (whose name has often another length), a paragraph in which a few words are wrong, and a text
that has nothing to do with the answer. Prints a table and, last, one line of JSON.
"""

import argparse
import asyncio
import json
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.serving_machine import on_a_passing_thread
from hack.embedded.corpus import draw
from hack.embedded.knowledge_tasks import STORIES, topic_text
from hack.embedded.texts import TOPICS
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.loading import load_model
from vdiff_kserve.openai.protocol import ChatCompletion, ChatCompletionRequest
from vdiff_kserve.openai.service import GenerationService

MAX_TOKENS = 160
IN_FLIGHT = 16
POLICIES = {
    "one token per step": {"policy": "low_confidence"},
    "threshold 0.9": {"policy": "threshold", "threshold": 0.9},
    "threshold 0.9, dual cache": {"policy": "threshold", "threshold": 0.9, "cache": "dual"},
}


@dataclass(frozen=True)
class Edit:
    """A prompt, its one right answer, and what is predicted."""

    kind: str
    prompt: str
    answer: str
    predicted: str


@dataclass
class Score:
    """Counts of one kind of edit."""

    edits: int = 0
    right: int = 0
    passes: int = 0
    accepted: int = 0
    rejected: int = 0


def edits(count: int) -> list[Edit]:
    """`count` of each kind."""
    rng = random.Random("prediction")
    found = []
    for _ in range(count):
        story = draw("story", rng, 1.0, held_out=True)
        name, thing = story.key.split("|")
        other = next(n for n in iter(lambda: _name(rng), "") if n != name)
        closing = f" And that is the story of {other} and the {thing}."
        about_other = STORIES[thing].format(name=other) + closing
        found.append(Edit("another name", story.prompt, story.answer, about_other))
        unrelated = topic_text(rng.choice(tuple(TOPICS)))
        found.append(Edit("unrelated", story.prompt, story.answer, unrelated))
        topic = draw("topic", rng, 1.0, held_out=True)
        words = topic.answer.split(" ")
        for place in rng.sample(range(len(words)), 3):
            words[place] = rng.choice(("purple", "seven", "never"))
        found.append(Edit("wrong words", topic.prompt, topic.answer, " ".join(words)))
    return found


def _name(rng: random.Random) -> str:
    return draw("story", rng, 1.0, held_out=False).key.split("|")[0]


async def measure(
    service: GenerationService, items: Sequence[Edit], decoding: dict[str, object], predicts: bool
) -> dict[str, Score]:
    """Answer all prompts, with what is predicted or without."""
    scores = {edit.kind: Score() for edit in items}
    places = asyncio.Semaphore(IN_FLIGHT)

    async def answer(edit: Edit) -> None:
        fields = {"prediction": {"content": edit.predicted}} if predicts else {}
        request = ChatCompletionRequest.model_validate(
            {
                "messages": [{"role": "user", "content": edit.prompt}],
                "max_tokens": MAX_TOKENS,
                "temperature": 0,
                **fields,
                **decoding,
            }
        )
        async with places:
            told = await service.respond(request)
        assert isinstance(told, ChatCompletion)
        score, details = scores[edit.kind], told.usage.completion_tokens_details
        score.edits += 1
        score.right += told.choices[0].message.content == edit.answer
        score.passes += told.vdiff.nfe
        if details is not None:
            score.accepted += details.accepted_prediction_tokens
            score.rejected += details.rejected_prediction_tokens

    tasks = [asyncio.create_task(answer(edit)) for edit in items]
    for done in tqdm(asyncio.as_completed(tasks), total=len(tasks), unit="edit", leave=False):
        await done
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=50, help="edits of each kind")
    parser.add_argument("--only", choices=POLICIES, nargs="+", default=list(POLICIES))
    parser.add_argument("--json", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    model = on_a_passing_thread(lambda: load_model(ServerConfig()))
    service = GenerationService(model.engine, model.tokenizer, model.limits, "embedded")
    items = edits(arguments.n)
    report: dict[str, dict[str, dict[str, float]]] = {}
    print(
        f"{'decoding':26s} {'prediction':13s} {'passes':>7s} {'without':>8s} "
        f"{'right':>6s} {'without':>8s} {'accepted':>9s}"
    )
    try:
        for name in arguments.only:
            decoding = POLICIES[name]
            plain = asyncio.run(measure(service, items, decoding, predicts=False))
            predicted = asyncio.run(measure(service, items, decoding, predicts=True))
            report[name] = {}
            for kind, score in predicted.items():
                row = {
                    "passes": score.passes / score.edits,
                    "passes_without": plain[kind].passes / score.edits,
                    "right": score.right / score.edits,
                    "right_without": plain[kind].right / score.edits,
                    "accepted": score.accepted / (score.accepted + score.rejected),
                }
                report[name][kind] = {key: round(value, 4) for key, value in row.items()}
                print(
                    f"{name:26s} {kind:13s} {row['passes']:7.1f} {row['passes_without']:8.1f} "
                    f"{row['right']:6.0%} {row['right_without']:8.0%} {row['accepted']:9.0%}"
                )
    finally:
        model.engine.stop()
    command = shlex.join(["python", "-m", "benchmarks.prediction", *sys.argv[1:]])
    line = json.dumps({"command": command, "edits": arguments.n, "decoding": report})
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
