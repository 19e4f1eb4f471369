"""The corpus: every task with its weight, a training stream and the held-out suite, all from a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from hack.embedded import knowledge_tasks, tasks
from hack.embedded.example import Example
from hack.embedded.tasks import Sampler

TASKS: dict[str, Sampler] = {
    "add": tasks.add,
    "subtract": tasks.subtract,
    "three_digits": tasks.three_digits,
    "sort": tasks.sort,
    "reverse": tasks.reverse,
    "copy": tasks.copy,
    "count": tasks.count,
    "case": tasks.case,
    "days": knowledge_tasks.days,
    "months": knowledge_tasks.months,
    "capitals": knowledge_tasks.capitals,
    "small_talk": knowledge_tasks.small_talk,
    "json": knowledge_tasks.extract,
    "fill_middle": knowledge_tasks.fill_middle,
    "topic": knowledge_tasks.topic,
    "story": knowledge_tasks.story,
}

BASE_WEIGHTS: dict[str, float] = {
    "add": 1.5,
    "subtract": 1.7,
    "three_digits": 0.05,
    "sort": 1.5,
    "reverse": 1.3,
    "copy": 1.0,
    "count": 2.4,
    "case": 1.6,
    "days": 0.6,
    "months": 0.6,
    "capitals": 0.9,
    "small_talk": 0.8,
    "json": 1.0,
    "fill_middle": 1.5,
    "topic": 0.9,
    "story": 0.35,
}


def draw(task: str, rng: random.Random, level: float, held_out: bool) -> Example:
    """One example of `task` on the wanted side of the hold-out split."""
    while True:
        example = TASKS[task](rng, level)
        if example.held_out == held_out:
            return example


@dataclass
class TrainingStream:
    """An endless stream of training examples; weights and level may be changed while it runs."""

    seed: int | str
    level: float = 0.0
    weights: dict[str, float] = field(default_factory=lambda: dict(BASE_WEIGHTS))

    def __post_init__(self) -> None:
        self.rng = random.Random(f"train-{self.seed}")

    def __iter__(self) -> Iterator[Example]:
        while True:
            task = self.rng.choices(tuple(self.weights), tuple(self.weights.values()))[0]
            yield draw(task, self.rng, self.level, held_out=False)


def held_out_suite(size: int = 1000, seed: int = 0) -> list[Example]:
    """`size` different prompts the training never sees, spread evenly over the tasks.

    A suite of another size or seed draws other prompts from the same held-out side.
    """
    rng = random.Random(f"held-out-{seed}")
    suite: dict[str, Example] = {}
    names = tuple(TASKS)
    for index in range(size):
        task = names[index % len(names)]
        while True:
            example = draw(task, rng, 1.0, held_out=True)
            if example.prompt not in suite:
                suite[example.prompt] = example
                break
    return list(suite.values())
