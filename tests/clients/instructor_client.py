"""What a program with instructor does: objects of pydantic classes, in its modes, and streamed."""

import os

import instructor
from openai import OpenAI
from pydantic import BaseModel

MESSAGES = [
    {"role": "user", "content": "Extract name and age as JSON: Anna is 34 years old."},
]


class Person(BaseModel):
    name: str
    age: int


client = OpenAI(base_url=os.environ["BASE_URL"], api_key="none")
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    extract = instructor.from_openai(client, mode=mode).chat.completions
    asked = {
        "model": "llada",
        "messages": MESSAGES,
        "response_model": Person,
        "max_retries": 0,
        "temperature": 0,
        "max_tokens": 64,
    }
    person, answer = extract.create_with_completion(**asked)
    assert isinstance(person, Person), mode
    assert person.age == 34, (mode, person)
    assert answer.usage.completion_tokens > 0
    *_, last = extract.create_partial(**asked)
    assert last.age == person.age, (mode, last)
    print(mode, person)
