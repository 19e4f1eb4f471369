"""One training or evaluation item, and the surface variation a person's typing adds to a phrasing."""

import hashlib
import random
from dataclasses import dataclass

HELD_OUT_SHARE = 10  # one key in ten is never trained on


@dataclass(frozen=True)
class Example:
    """A single-turn chat with one right answer.

    `key` names what is held out: the payload where payloads are many, else the pair of item and phrasing.
    """

    task: str
    key: str
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether the item belongs to the evaluation, decided by a hash of task and key alone."""
        digest = hashlib.blake2b(f"{self.task}\0{self.key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def typed(rng: random.Random, phrasing: str) -> str:
    """A phrasing as somebody might type it: case of the first letter, please, final punctuation.

    Placeholders in braces stay as they are, so payloads keep their case.
    """
    text = phrasing
    if text.startswith("JSON"):
        return text
    draw = rng.random()
    if draw < 0.08 and text[0] != "{":
        text = "Please " + text[0].lower() + text[1:]
    elif draw < 0.14:
        text = text.rstrip("?.!") + ", please" + (text[-1] if text[-1] in "?.!" else "")
    elif draw < 0.20 and text[0] != "{":
        text = "Can you tell me: " + text[0].lower() + text[1:]
    elif draw < 0.24:
        text = "Hi! " + text
    draw = rng.random()
    if draw < 0.25 and text[0] != "{":
        text = text[0].lower() + text[1:]
    draw = rng.random()
    if draw < 0.20:
        text = text.rstrip("?.!")
    elif draw < 0.25:
        text = text.rstrip("?.!") + " ?"
    elif draw < 0.28:
        text = text.rstrip("?.!") + "."
    return text
