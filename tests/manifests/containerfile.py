"""A Containerfile, read into its stages and instructions."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTIONS = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL",
    "RUN", "USER", "WORKDIR",
}  # fmt: skip


@dataclass
class Stage:
    """What stands between one FROM and the next.

    Attributes:
        base: the image it starts from, variables not yet replaced.
        name: what other stages call it.
        steps: pairs of instruction and its text.
    """

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]

    def last(self, instruction: str) -> str:
        return self.all(instruction)[-1]

    def exec_form(self, instruction: str) -> list[str]:
        """The words of an instruction in JSON form."""
        return json.loads(self.last(instruction))

    def pairs(self, instruction: str) -> dict[str, str]:
        """The names and values of ENV, LABEL or ARG."""
        words = [word for text in self.all(instruction) for word in shlex.split(text)]
        return {name: value for name, _, value in (word.partition("=") for word in words)}


def parse(file: Path) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first stage, and the stages.

    Raises:
        ValueError: an instruction that does not exist, or one before the first stage.
    """
    lines = [
        line
        for line in file.read_text(encoding="utf-8").splitlines()
        if not line.lstrip().startswith("#")
    ]
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, _, text = line.partition(" ")
        if name not in INSTRUCTIONS:
            raise ValueError(f"{name} is no instruction")
        if name == "FROM":
            base, _, alias = text.partition(" AS ")
            stages.append(Stage(base, alias))
        elif stages:
            stages[-1].steps.append((name, text))
        elif name == "ARG":
            key, _, value = text.partition("=")
            arguments[key] = value
        else:
            raise ValueError(f"{name} before the first FROM")
    return arguments, stages
