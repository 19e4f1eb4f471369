"""The embedded model's tasks: each draws an example at a difficulty between 0 (first steps) and 1 (full)."""

import json
import random
import string
from collections.abc import Callable, Iterator

from hack.embedded.example import Example, typed
from hack.embedded.words import COMMON_WORDS, DAYS, MONTHS, NAMES

Sampler = Callable[[random.Random, float], Example]

ADD_PHRASINGS = (
    "What is {a} + {b}?",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} = ?",
    "{a}+{b}=",
    "Add {a} and {b}.",
    "Add {b} to {a}.",
    "What is {a} plus {b}?",
    "Calculate {a} + {b}.",
    "Compute {a} plus {b}.",
    "How much is {a} + {b}?",
    "What is the sum of {a} and {b}?",
    "Sum of {a} and {b}",
    "What do you get when you add {a} and {b}?",
    "I have {a} apples and get {b} more. How many apples do I have?",
    "If I add {a} and {b}, what is the result?",
)

SUBTRACT_PHRASINGS = (
    "What is {a} - {b}?",
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} = ?",
    "{a}-{b}=",
    "Subtract {b} from {a}.",
    "Take {b} away from {a}.",
    "What is {a} minus {b}?",
    "Calculate {a} - {b}.",
    "Compute {a} minus {b}.",
    "How much is {a} - {b}?",
    "What is the difference between {a} and {b}?",
    "What do you get when you take {b} from {a}?",
    "I have {a} coins and spend {b}. How many coins are left?",
    "If I subtract {b} from {a}, what is the result?",
)

SORT_PHRASINGS = (
    "Sort {x}",
    "Sort these numbers: {x}",
    "Sort the numbers {x}.",
    "Sort {x} in ascending order.",
    "Put these numbers in order: {x}",
    "Put {x} in order.",
    "Order these numbers from smallest to largest: {x}",
    "Arrange {x} from low to high.",
    "Arrange these numbers in increasing order: {x}",
    "What is the sorted order of {x}?",
    "Can you sort {x} for me?",
    "Sort this list: [{x}]",
    "sort({x})",
)

SORT_DOWN_PHRASINGS = (
    "Sort {x} in descending order.",
    "Sort these numbers from largest to smallest: {x}",
    "Order these numbers from largest to smallest: {x}",
    "Arrange {x} from high to low.",
    "Put {x} in decreasing order.",
    "Sort {x} in reverse order.",
)

REVERSE_PHRASINGS = (
    "Reverse {x}",
    "Reverse the word {x}.",
    "Reverse the letters of {x}.",
    "Spell {x} backwards.",
    "Write {x} backwards.",
    "What is {x} backwards?",
    "What is {x} spelled backwards?",
    "Reverse this string: {x}",
    "Turn {x} around.",
    "How do you write {x} in reverse?",
    "Give me {x} in reverse.",
    "What do you get when you reverse {x}?",
    "Reverse: {x}",
)

COPY_PHRASINGS = (
    "Repeat after me: {x}",
    "Repeat {x}",
    "Copy {x}",
    "Copy this: {x}",
    "Say {x}",
    "Echo {x}",
    "Write {x}",
    "Repeat this text: {x}",
    "Copy the following: {x}",
    "Say exactly this: {x}",
    "Please repeat: {x}",
    "Type {x} again.",
    "Print {x}",
)

COUNT_PHRASINGS = (
    "How many letters are in {x}?",
    "How many letters does {x} have?",
    "How many letters are there in the word {x}?",
    "Count the letters in {x}.",
    "Count the letters of {x}.",
    "What is the length of {x}?",
    "How long is the word {x}?",
    "Number of letters in {x}",
    "Tell me how many letters {x} has.",
    "How many characters are in {x}?",
)

COUNT_ONE_PHRASINGS = (
    "How many times does the letter {c} appear in {x}?",
    "How many {c} are in {x}?",
    "How many {c}'s are in {x}?",
    "How many {c}'s are there in {x}?",
    "Count the letter {c} in {x}.",
    "Count the {c}'s in {x}.",
    "How often does {c} occur in {x}?",
    "How many times is {c} in {x}?",
    "Number of {c}'s in {x}",
    "How many letters {c} does {x} have?",
)

UPPER_PHRASINGS = (
    "Write {x} in upper case.",
    "Write {x} in uppercase.",
    "Write {x} in capital letters.",
    "Convert {x} to uppercase.",
    "Convert {x} to upper case.",
    "Make {x} uppercase.",
    "Uppercase {x}",
    "Turn {x} into upper case.",
    "Change {x} to capital letters.",
    "Capitalize all letters of {x}.",
    "What is {x} in upper case?",
    "upper({x})",
)

LOWER_PHRASINGS = (
    "Write {x} in lower case.",
    "Write {x} in lowercase.",
    "Write {x} in small letters.",
    "Convert {x} to lowercase.",
    "Convert {x} to lower case.",
    "Make {x} lowercase.",
    "Lowercase {x}",
    "Turn {x} into lower case.",
    "Change {x} to small letters.",
    "What is {x} in lower case?",
    "lower({x})",
)


def _sum_working(a: int, b: int) -> str:
    """Column addition, units first, each carry written out: "7 + 5 = 12, 1 + 2 + 1 = 4"."""
    digits = max(len(str(a)), len(str(b)))
    steps, carry = [], 0
    for place in range(digits):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        steps.append(f"{x} + {y}{' + 1' if carry else ''} = {total}")
        carry = total // 10
    return ", ".join(steps)


def _difference_working(a: int, b: int) -> str:
    """Column subtraction for a >= b, units first; a borrow makes the digit ten larger."""
    digits = len(str(a))
    steps, borrow = [], 0
    for place in range(digits):
        x, y = a // 10**place % 10, b // 10**place % 10
        lend = 10 if x - y - borrow < 0 else 0
        steps.append(f"{x + lend} - {y}{' - 1' if borrow else ''} = {x + lend - y - borrow}")
        borrow = lend // 10
    return ", ".join(steps)


def digit_facts(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Steps of a column: "7 + 5 + 1 = " and "13", or "12 - 5 = " and "7"."""
    while True:
        x, y, carry = rng.randint(0, 9), rng.randint(0, 9), rng.randint(0, 1)
        if rng.random() < 0.5:
            yield f"{x} + {y}{' + 1' if carry else ''} = ", str(x + y + carry)
        else:
            lend = 10 if x - y - carry < 0 else 0
            yield f"{x + lend} - {y}{' - 1' if carry else ''} = ", str(x + lend - y - carry)


def sum_answer(a: int, b: int) -> str:
    """The answer to a + b, with working where a number has more than one digit."""
    result = f"{a} + {b} = {a + b}."
    return result if max(a, b) < 10 else f"{_sum_working(a, b)}, so {result}"


def difference_answer(a: int, b: int) -> str:
    """The answer to a - b, with working where a number has more than one digit."""
    if a < b:
        if b < 10:
            return f"{a} - {b} = -{b - a}."
        return f"{_difference_working(b, a)}, so {b} - {a} = {b - a} and {a} - {b} = -{b - a}."
    result = f"{a} - {b} = {a - b}."
    return result if a < 10 else f"{_difference_working(a, b)}, so {result}"


def add(rng: random.Random, level: float) -> Example:
    """Addition of numbers of at most two digits."""
    top = 9 if rng.random() < max(0.08, 0.5 - level) else 99
    low = 10 if top == 99 and rng.random() < 0.85 else 0
    a, b = rng.randint(low, top), rng.randint(low, top)
    prompt = typed(rng, rng.choice(ADD_PHRASINGS)).format(a=a, b=b)
    return Example("add", f"{a}+{b}", prompt, sum_answer(a, b))


def subtract(rng: random.Random, level: float) -> Example:
    """Subtraction of numbers of at most two digits; one in ten has a negative result."""
    top = 9 if rng.random() < max(0.08, 0.5 - level) else 99
    low = 10 if top == 99 and rng.random() < 0.85 else 0
    a, b = rng.randint(low, top), rng.randint(low, top)
    if a < b and rng.random() < 0.8:
        a, b = b, a
    prompt = typed(rng, rng.choice(SUBTRACT_PHRASINGS)).format(a=a, b=b)
    return Example("subtract", f"{a}-{b}", prompt, difference_answer(a, b))


def three_digits(rng: random.Random, level: float) -> Example:
    """Addition and subtraction where at least one number has three digits."""
    a = rng.randint(100, 999)
    b = rng.randint(100, 999) if rng.random() < 0.75 else rng.randint(10, 99)
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            a, b = b, a
        prompt = typed(rng, rng.choice(ADD_PHRASINGS)).format(a=a, b=b)
        return Example("three_digits", f"{a}+{b}", prompt, sum_answer(a, b))
    a, b = max(a, b), min(a, b)
    prompt = typed(rng, rng.choice(SUBTRACT_PHRASINGS)).format(a=a, b=b)
    return Example("three_digits", f"{a}-{b}", prompt, difference_answer(a, b))


def sort_answer(numbers: list[int], descending: bool) -> str:
    """The numbers in order, and nothing else."""
    return f"{', '.join(map(str, sorted(numbers, reverse=descending)))}."


def sort_facts(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Lists of a number and their order, all up or all down: "40 7 12 up: " and "7, 12, 40"."""
    descending = rng.random() < 0.3
    while True:
        top = rng.choices((9, 99), (0.3, 0.7))[0]
        numbers = rng.sample(range(top + 1), rng.randint(3, 5))
        listed = ", ".join(map(str, numbers))
        result = sort_answer(numbers, descending).rstrip(".")
        yield f"{listed} {'down' if descending else 'up'}: ", result


def spelling_facts(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Words that are one token, and their letters: "Oliver: " and "OLIVER", or the like."""
    change = rng.choice((str.upper, str.lower, lambda word: word[::-1], "-".join))
    while True:
        word = rng.choice(NAMES) if rng.random() < 0.6 else rng.choice(COMMON_WORDS)
        yield f"{rng.choice((' ', ''))}{word}: ", change(word)


def count_facts(rng: random.Random) -> Iterator[tuple[str, str]]:
    """A word and a letter, and how often it occurs: "o in book: " and "bOOk 2"."""
    while True:
        word = payload_word(rng, 1.0)
        letter = rng.choice(word).lower() if rng.random() < 0.8 else rng.choice("aeioulnrst")
        yield f"{letter} in {word}: ", f"{mark_letter(word, letter)} {word.lower().count(letter)}"


def sequence_facts(rng: random.Random) -> Iterator[tuple[str, str]]:
    """A sequence of numbers, days or months with a gap, and the sequence."""
    while True:
        items = sequence(rng)
        hole = rng.randrange(1, 3)
        gapped = ", ".join("___" if i == hole else item for i, item in enumerate(items))
        yield f"{gapped}: ", ", ".join(items)


def sort(rng: random.Random, level: float) -> Example:
    """Three to five different numbers, ascending or descending."""
    count = rng.choices((2, 3, 4, 5), (max(0.0, 0.5 - level), 1.0, 0.4 + level, 0.2 + level))[0]
    if count == 2:
        count = 3
    top = rng.choices((9, 99, 999), (0.25 + max(0.0, 1 - 2 * level), 1.0, 0.1 * level))[0]
    numbers = rng.sample(range(0 if top == 9 else 1, top + 1), count)
    descending = rng.random() < 0.2
    joined = rng.choices((", ", " ", ","), (0.7, 0.2, 0.1))[0].join(map(str, numbers))
    phrasing = rng.choice(SORT_DOWN_PHRASINGS if descending else SORT_PHRASINGS)
    prompt = typed(rng, phrasing).format(x=joined)
    key = ",".join(map(str, numbers))
    return Example("sort", key, prompt, sort_answer(numbers, descending))


def payload_word(rng: random.Random, level: float) -> str:
    """A word to spell: common words and names, else random letters of a length the level allows."""
    longest = 4 + round(6 * min(1.0, 2 * level))
    draw = rng.random()
    if draw < 0.30:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, longest)))
    while True:
        word = rng.choice(NAMES) if draw < 0.37 else rng.choice(COMMON_WORDS)
        if len(word) <= longest:
            return word


def quoted(rng: random.Random, text: str) -> str:
    """The payload as typed: bare, or in one of the usual quotes."""
    return rng.choices((text, f'"{text}"', f"'{text}'"), (0.5, 0.3, 0.2))[0]


def reverse(rng: random.Random, level: float) -> Example:
    """A word backwards; the answer spells it first."""
    word = payload_word(rng, level)
    prompt = typed(rng, rng.choice(REVERSE_PHRASINGS)).format(x=quoted(rng, word))
    return Example("reverse", word, prompt, f"{'-'.join(word)} backwards is {word[::-1]}")


def copy(rng: random.Random, level: float) -> Example:
    """One to four words, or a number, repeated exactly."""
    if rng.random() < 0.15:
        text = str(rng.randint(0, 10 ** rng.randint(1, 6)))
    else:
        count = rng.choices((1, 2, 3, 4), (1.0, 0.5, 0.2 + level / 2, level / 2))[0]
        text = " ".join(payload_word(rng, level) for _ in range(count))
        text = rng.choices((text, text.upper(), text.title()), (0.8, 0.1, 0.1))[0]
    prompt = typed(rng, rng.choice(COPY_PHRASINGS)).format(x=quoted(rng, text))
    return Example("copy", text, prompt, text)


def count(rng: random.Random, level: float) -> Example:
    """The letters of a word, numbered, or how often one of them occurs."""
    word = payload_word(rng, level)
    if rng.random() < 0.5:
        prompt = typed(rng, rng.choice(COUNT_PHRASINGS)).format(x=quoted(rng, word))
        listed = " ".join(f"{letter}{i}" for i, letter in enumerate(word, 1))
        return Example("count", word, prompt, f"{listed}: {len(word)} letters.")
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice(string.ascii_lowercase)
    letter = letter.lower()
    prompt = typed(rng, rng.choice(COUNT_ONE_PHRASINGS)).format(c=letter, x=quoted(rng, word))
    return Example("count", word, prompt, count_answer(word, letter))


def count_answer(word: str, letter: str) -> str:
    """How often `letter` occurs in `word`, its places in capitals: "bOOk: o appears 2 times."."""
    total = word.lower().count(letter)
    times = "once" if total == 1 else f"{total} times"
    return f"{mark_letter(word, letter)}: {letter} appears {times}."


def mark_letter(word: str, letter: str) -> str:
    """The word in small letters, only `letter` in capitals."""
    return word.lower().replace(letter, letter.upper())


def case(rng: random.Random, level: float) -> Example:
    """One to three words in upper or lower case."""
    words = rng.choices((1, 2, 3), (1.0, 0.4, 0.2 * level))[0]
    text = " ".join(payload_word(rng, level) for _ in range(words))
    if rng.random() < 0.55:
        typed_text = rng.choices((text, text.title()), (0.8, 0.2))[0]
        prompt = typed(rng, rng.choice(UPPER_PHRASINGS)).format(x=quoted(rng, typed_text))
        return Example("case", text.lower(), prompt, text.upper())
    typed_text = rng.choices((text.upper(), text.title()), (0.7, 0.3))[0]
    prompt = typed(rng, rng.choice(LOWER_PHRASINGS)).format(x=quoted(rng, typed_text))
    return Example("case", text.lower(), prompt, text.lower())


def sequence(rng: random.Random) -> list[str]:
    """Four neighbours: numbers a step apart, days, or months."""
    if rng.random() < 0.5:
        start, step = rng.randint(1, 60), rng.choice((1, 1, 2, 5, 10))
        return [str(start + step * i) for i in range(4)]
    cycle = rng.choice((DAYS, MONTHS))
    start = rng.randrange(len(cycle))
    return [cycle[(start + i) % len(cycle)] for i in range(4)]


def as_json(fields: dict[str, str | int]) -> str:
    """JSON text as `json.dumps` writes it."""
    return json.dumps(fields, ensure_ascii=False)
