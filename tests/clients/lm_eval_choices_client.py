"""lm-eval's multiple choice by log-likelihoods: a task from a file, whose answers must come out."""

import json
import os
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

FOLDER = Path(sys.argv[1])
TOKENIZER = sys.argv[2]
CHOICES = ("Paris", "Rome", "Madrid", "Tokyo")
COUNTRIES = ("France", "Italy", "Spain", "Japan")
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""

data = FOLDER / "capitals.jsonl"
items = [
    {"country": country, "choices": [f"{choice}." for choice in CHOICES], "right": right}
    for right, country in enumerate(COUNTRIES)
]
data.write_text("".join(json.dumps(item) + "\n" for item in items))
(FOLDER / "capitals.yaml").write_text(TASK.replace("DATA", str(data)))

results = lm_eval.simple_evaluate(
    "local-completions",
    model_args={
        "model": "llada",
        "base_url": f"{os.environ['BASE_URL']}/completions",
        "num_concurrent": 2,
        "tokenizer": TOKENIZER,
        "tokenizer_backend": "huggingface",
        "max_length": 512,
    },
    batch_size=4,
    tasks=["capitals"],
    task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
    log_samples=True,
    bootstrap_iters=0,
)
samples = results["samples"]["capitals"]
assert len(samples) == len(COUNTRIES)
for sample in samples:
    told = [float(logprob) for ((logprob, _),) in sample["resps"]]
    assert len(told) == len(CHOICES)
    assert all(each < 0 for each in told), told
    print(sample["doc"]["country"], told)
assert results["results"]["capitals"]["acc,none"] >= 0.75, results["results"]
