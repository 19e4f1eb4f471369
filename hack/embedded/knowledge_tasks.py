"""Tasks with closed answers: calendar, capitals, small talk, JSON, gaps, topics and stories.

What is held out here is the pair of item and phrasing, since the items themselves must be learned.
"""

import random
import re
import string

from hack.embedded.content import GAPS, SMALL_TALK
from hack.embedded.example import Example, typed
from hack.embedded.tasks import as_json, sequence
from hack.embedded.texts import STORIES, TOPICS
from hack.embedded.words import CAPITALS, DAYS, MONTH_LENGTHS, MONTHS, NAMES, ORDINALS

NEXT_PHRASINGS = (
    "What {unit} comes after {x}?",
    "Which {unit} comes after {x}?",
    "What {unit} follows {x}?",
    "Which {unit} is after {x}?",
    "What comes after {x}?",
    "What is the {unit} after {x}?",
    "Name the {unit} after {x}.",
    "Tell me the {unit} that follows {x}.",
    "The {unit} after {x} is?",
    "Next {unit} after {x}",
)

PREVIOUS_PHRASINGS = (
    "What {unit} comes before {x}?",
    "Which {unit} comes before {x}?",
    "What {unit} precedes {x}?",
    "Which {unit} is before {x}?",
    "What comes before {x}?",
    "What is the {unit} before {x}?",
    "Name the {unit} before {x}.",
    "Tell me the {unit} that comes before {x}.",
    "The {unit} before {x} is?",
    "Previous {unit} before {x}",
)

NTH_PHRASINGS = (
    "What is the {n} {unit} of the {whole}?",
    "Which {unit} is the {n} of the {whole}?",
    "Name the {n} {unit} of the {whole}.",
    "Tell me the {n} {unit} of the {whole}.",
    "What {unit} is the {n} in the {whole}?",
    "The {n} {unit} of the {whole} is?",
    "Which is the {n} {unit}?",
    "{n} {unit} of the {whole}",
)

LENGTH_PHRASINGS = (
    "How many days does {x} have?",
    "How many days are in {x}?",
    "How many days are there in {x}?",
    "How long is {x}?",
    "Number of days in {x}",
    "What is the length of {x} in days?",
    "Tell me how many days {x} has.",
)

TODAY_PHRASINGS = (
    "If today is {x}, what day is tomorrow?",
    "Today is {x}. What day is tomorrow?",
    "If it is {x} today, what is tomorrow?",
    "Today is {x}, so what is tomorrow?",
    "What day is tomorrow if today is {x}?",
    "It is {x}. Which day is tomorrow?",
)

YESTERDAY_PHRASINGS = (
    "If today is {x}, what day was yesterday?",
    "Today is {x}. What day was yesterday?",
    "If it is {x} today, what was yesterday?",
    "Today is {x}, so what was yesterday?",
    "What day was yesterday if today is {x}?",
    "It is {x}. Which day was yesterday?",
)

ALL_DAYS_PHRASINGS = (
    "List the days of the week.",
    "Name the days of the week.",
    "What are the days of the week?",
    "Tell me the days of the week.",
    "Which days does a week have?",
    "Days of the week",
    "Name all seven days.",
    "Can you list the days?",
)

ALL_MONTHS_PHRASINGS = (
    "List the months of the year.",
    "Name the months of the year.",
    "What are the months of the year?",
    "Tell me the months of the year.",
    "Which months does a year have?",
    "Months of the year",
    "Name all twelve months.",
    "Can you list the months?",
)

CAPITAL_PHRASINGS = (
    "What is the capital of {x}?",
    "What's the capital of {x}?",
    "Which city is the capital of {x}?",
    "Capital of {x}",
    "Name the capital of {x}.",
    "Tell me the capital of {x}.",
    "What is the capital city of {x}?",
    "{x}'s capital?",
    "The capital of {x} is?",
    "Do you know the capital of {x}?",
    "What city is the capital of {x}?",
    "What is the name of the capital of {x}?",
    "I want to know the capital of {x}.",
    "Give me the capital of {x}.",
)

COUNTRY_PHRASINGS = (
    "{x} is the capital of which country?",
    "Which country has {x} as its capital?",
    "Of which country is {x} the capital?",
    "What country is {x} the capital of?",
    "{x} is the capital of what country?",
    "Name the country whose capital is {x}.",
)

JSON_PHRASINGS = (
    "Extract {keys} as JSON: {x}",
    "Extract {keys} from this sentence as JSON: {x}",
    "Return JSON with {keys}: {x}",
    "Give me {keys} as JSON. {x}",
    "Convert to JSON with {keys}: {x}",
    "Turn this into JSON with {keys}: {x}",
    "JSON with {keys}: {x}",
    "Find {keys} in this sentence and answer in JSON: {x}",
    "Read the sentence and write JSON with {keys}: {x}",
    "Make a JSON object with {keys} from this: {x}",
)

PERSON_SENTENCES = (
    "{name} is {age} years old and lives in {city}.",
    "{name} lives in {city} and is {age} years old.",
    "{name}, {age}, lives in {city}.",
    "My friend {name} from {city} is {age}.",
    "{name} is {age} and comes from {city}.",
    "In {city} I met {name}, who is {age} years old.",
    "At the age of {age} {name} moved to {city}.",
)

ORDER_SENTENCES = (
    "{name} bought {count} {item}s for {price} dollars.",
    "{name} paid {price} dollars for {count} {item}s.",
    "For {price} dollars {name} got {count} {item}s.",
    "{name} ordered {count} {item}s and paid {price} dollars.",
    "{count} {item}s were sold to {name} for {price} dollars.",
    "Yesterday {name} bought {count} {item}s. They cost {price} dollars.",
)

MEETING_SENTENCES = (
    "{name} meets {other} on {day} at {hour}.",
    "On {day} at {hour} {name} meets {other}.",
    "{name} and {other} have a meeting on {day} at {hour}.",
    "There is a meeting of {name} and {other} on {day} at {hour}.",
    "{name} will see {other} at {hour} on {day}.",
    "Lunch with {name} and {other} is on {day} at {hour}.",
)

ITEMS = tuple(
    """apple book ball pen cup shirt lamp chair ticket candle basket bottle carrot egg flower hat
    key mug orange pillow ring scarf table watch lemon onion plate spoon button guitar""".split()
)

GAP_PHRASINGS = (
    "Fill in the blank: {x}",
    "Fill in the missing word: {x}",
    "Complete the sentence: {x}",
    "What word is missing? {x}",
    "Which word fits in the gap? {x}",
    "Fill the gap: {x}",
    "Complete: {x}",
    "Find the missing word: {x}",
    "Put a word in the blank: {x}",
    "{x} What goes in the blank?",
)

TOPIC_PHRASINGS = (
    "Tell me about {x}.",
    "Tell me something about {x}.",
    "What do you know about {x}?",
    "Explain {x}.",
    "Write a short text about {x}.",
    "Write a paragraph about {x}.",
    "Describe {x}.",
    "Give me a short text about {x}.",
    "Can you explain {x} to me?",
    "I want to learn about {x}.",
    "Say a few words about {x}.",
    "What can you tell me about {x}?",
    "Write a few sentences about {x}.",
    "{x}",
)

STORY_PHRASINGS = (
    "Tell me a story about {name} and a {x}.",
    "Write a story about {name} and a {x}.",
    "Tell me a short story about {name} and the {x}.",
    "Write a short story about {name} and the {x}.",
    "Give me a story with {name} and a {x}.",
    "I want to hear a story about {name} and a {x}.",
    "Make up a story about {name} and a {x}.",
    "A story about {name} and a {x}",
    "Can you tell a story about {name} and a {x}?",
    "Tell a tale about {name} and a {x}.",
)


def _choose(rng: random.Random, phrasings: tuple[str, ...]) -> tuple[int, str]:
    index = rng.randrange(len(phrasings))
    return index, phrasings[index]


def _cyclic(
    rng: random.Random, task: str, items: tuple[str, ...], unit: str, whole: str
) -> Example:
    """What follows, precedes or is the n-th of a cycle of named items."""
    index = rng.randrange(len(items))
    item = items[index]
    kind = rng.choices(("next", "previous", "nth"), (1.0, 1.0, 0.7))[0]
    if kind == "nth":
        which, phrasing = _choose(rng, NTH_PHRASINGS)
        prompt = typed(rng, phrasing).format(n=ORDINALS[index], unit=unit, whole=whole)
        answer = f"The {ORDINALS[index]} {unit} of the {whole} is {item}."
    elif kind == "next":
        which, phrasing = _choose(rng, NEXT_PHRASINGS)
        prompt = typed(rng, phrasing).format(x=item, unit=unit)
        answer = f"{items[(index + 1) % len(items)]} comes after {item}."
    else:
        which, phrasing = _choose(rng, PREVIOUS_PHRASINGS)
        prompt = typed(rng, phrasing).format(x=item, unit=unit)
        answer = f"{items[index - 1]} comes before {item}."
    return Example(task, f"{kind}|{item}|{which}", prompt, answer)


def days(rng: random.Random, level: float) -> Example:
    """Days of the week: after, before, n-th, tomorrow, yesterday, the list."""
    draw = rng.random()
    if draw < 0.6:
        return _cyclic(rng, "days", DAYS, "day", "week")
    if draw < 0.68:
        which, phrasing = _choose(rng, ALL_DAYS_PHRASINGS)
        prompt = typed(rng, phrasing)
        answer = f"The days of the week are {', '.join(DAYS[:-1])} and {DAYS[-1]}."
        return Example("days", f"all|{prompt}", prompt, answer)
    index = rng.randrange(7)
    tomorrow = draw < 0.84
    which, phrasing = _choose(rng, TODAY_PHRASINGS if tomorrow else YESTERDAY_PHRASINGS)
    prompt = typed(rng, phrasing).format(x=DAYS[index])
    if tomorrow:
        answer = f"Tomorrow is {DAYS[(index + 1) % 7]}."
    else:
        answer = f"Yesterday was {DAYS[index - 1]}."
    return Example("days", f"{tomorrow}|{index}|{which}", prompt, answer)


def months(rng: random.Random, level: float) -> Example:
    """Months of the year: after, before, n-th, how many days, the list."""
    draw = rng.random()
    if draw < 0.65:
        return _cyclic(rng, "months", MONTHS, "month", "year")
    if draw < 0.73:
        which, phrasing = _choose(rng, ALL_MONTHS_PHRASINGS)
        prompt = typed(rng, phrasing)
        answer = f"The months of the year are {', '.join(MONTHS[:-1])} and {MONTHS[-1]}."
        return Example("months", f"all|{prompt}", prompt, answer)
    index = rng.randrange(12)
    which, phrasing = _choose(rng, LENGTH_PHRASINGS)
    prompt = typed(rng, phrasing).format(x=MONTHS[index])
    answer = f"{MONTHS[index]} has {MONTH_LENGTHS[index]} days."
    return Example("months", f"length|{index}|{which}", prompt, answer)


def capitals(rng: random.Random, level: float) -> Example:
    """Capitals of sixty countries, in both directions."""
    country, city = rng.choice(tuple(CAPITALS.items()))
    if rng.random() < 0.8:
        which, phrasing = _choose(rng, CAPITAL_PHRASINGS)
        prompt = typed(rng, phrasing).format(x=country)
        return Example(
            "capitals", f"{country}|{which}", prompt, f"The capital of {country} is {city}."
        )
    which, phrasing = _choose(rng, COUNTRY_PHRASINGS)
    prompt = typed(rng, phrasing).format(x=city)
    return Example("capitals", f"{city}|{which}", prompt, f"{city} is the capital of {country}.")


def small_talk(rng: random.Random, level: float) -> Example:
    """Greetings, identity, abilities, thanks and the like, in many spellings."""
    name, variants, answer = rng.choice(SMALL_TALK)
    text = rng.choice(variants)
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    bare = text.rstrip("?")
    draw = rng.random()
    if draw < 0.25:
        text = bare
    elif draw < 0.40:
        text = bare + ("?" if text.endswith("?") else "!")
    elif draw < 0.50:
        text = bare + "."
    elif draw < 0.55:
        text = text.lower()
    elif draw < 0.62 and name not in ("greeting", "bye", "night"):
        text = rng.choice(("Hi, ", "Hello, ", "Hey, ")) + text[0].lower() + text[1:]
    return Example("small_talk", re.sub(r"\W", "", text.lower()) + text[-1], text, answer)


def _name(rng: random.Random) -> str:
    """A first name, or in one case of four an invented one."""
    if rng.random() < 0.75:
        return rng.choice(NAMES)
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7))).title()


def extract(rng: random.Random, level: float) -> Example:
    """Two or three named fields of a sentence, as a JSON object in the order asked for."""
    kind = rng.choice(("person", "order", "meeting"))
    name = _name(rng)
    values: dict[str, str | int]
    if kind == "person":
        city = rng.choice(tuple(CAPITALS.values()))
        values = {"name": name, "age": rng.randint(1, 99), "city": city}
        sentence = rng.choice(PERSON_SENTENCES).format(**values)
    elif kind == "order":
        item = rng.choice(ITEMS)
        values = {"name": name, "item": item, "count": rng.randint(2, 99)}
        values["price"] = rng.randint(2, 999)
        sentence = rng.choice(ORDER_SENTENCES).format(**values)
    else:
        hour = f"{rng.randint(1, 12)}:{rng.choice(('00', '15', '30', '45'))}"
        values = {"name": name, "other": _name(rng), "day": rng.choice(DAYS), "hour": hour}
        sentence = rng.choice(MEETING_SENTENCES).format(**values)
    keys = rng.sample(list(values), rng.choices((1, 2, 3), (0.15, 0.45, 0.4))[0])
    listed = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    prompt = typed(rng, rng.choice(JSON_PHRASINGS)).format(keys=listed, x=sentence)
    return Example("json", sentence, prompt, as_json({key: values[key] for key in keys}))


def fill_middle(rng: random.Random, level: float) -> Example:
    """A sentence with a gap, a gap in a sequence of numbers, days or months; the answer is complete."""
    which, phrasing = _choose(rng, GAP_PHRASINGS)
    blank = rng.choice(("___", "____", "__", "..."))
    draw = rng.random()
    if draw < 0.5:
        gap = rng.choice(GAPS)
        sentence = re.sub(r"\[.*?\]", blank, gap)
        key, answer = f"{gap}|{which}", gap.replace("[", "").replace("]", "")
    else:
        items = sequence(rng)
        hole = rng.randrange(1, 3)
        sentence = ", ".join(blank if i == hole else item for i, item in enumerate(items))
        answer = ", ".join(items)
        key = f"{answer}|{hole}"
    prompt = typed(rng, phrasing).format(x=sentence)
    return Example("fill_middle", key, prompt, answer)


def topic_text(name: str) -> str:
    """The paragraph about a topic, closing with two topics to ask about next."""
    names = tuple(TOPICS)
    index = names.index(name)
    first, second = names[(index + 1) % len(names)], names[(index + 2) % len(names)]
    return f"{TOPICS[name]} You can also ask me about {first} or {second}."


def topic(rng: random.Random, level: float) -> Example:
    """A paragraph about one of the topics, or one each about two of them."""
    which, phrasing = _choose(rng, TOPIC_PHRASINGS)
    if rng.random() < 0.1 * level:
        first, second = rng.sample(tuple(TOPICS), 2)
        prompt = typed(rng, phrasing).format(x=f"{first} and {second}")
        answer = f"{TOPICS[first]} {TOPICS[second]}"
        return Example("topic", f"{first}|{second}", prompt, answer)
    name = rng.choice(tuple(TOPICS))
    prompt = typed(rng, phrasing).format(x=name)
    return Example("topic", f"{name}|{which}", prompt, topic_text(name))


def story(rng: random.Random, level: float) -> Example:
    """A short story with a given hero and companion."""
    thing = rng.choice(tuple(STORIES))
    name = _name(rng)
    prompt = typed(rng, rng.choice(STORY_PHRASINGS)).format(name=name, x=thing)
    answer = f"{STORIES[thing].format(name=name)} And that is the story of {name} and the {thing}."
    return Example("story", f"{name}|{thing}", prompt, answer)
