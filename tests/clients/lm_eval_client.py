"""lm-eval's generative tasks against both endpoints: a task of three sums from a file."""

import json
import os
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

FOLDER = Path(sys.argv[1])
TOKENIZER = sys.argv[2]
SUMS = [("17 + 25", "42"), ("3 + 4", "7"), ("20 + 11", "31")]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "What is {{sum}}?"
doc_to_target: "{{total}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 48, temperature: 0, do_sample: false}
metric_list:
  - {metric: CONTAINS, aggregation: mean, higher_is_better: true}
process_results: !function sums.contains
"""
CODE = """
def contains(doc, results):
    return {"CONTAINS": float(doc["total"] in results[0])}
"""

data = FOLDER / "sums.jsonl"
data.write_text("".join(json.dumps({"sum": s, "total": t}) + "\n" for s, t in SUMS))
(FOLDER / "sums.py").write_text(CODE)
(FOLDER / "sums.yaml").write_text(TASK.replace("DATA", str(data)))

for kind, path, chat in (
    ("local-chat-completions", "chat/completions", True),
    ("local-completions", "completions", False),
):
    arguments = {
        "model": "llada",
        "base_url": f"{os.environ['BASE_URL']}/{path}",
        "num_concurrent": 2,
        "tokenizer": TOKENIZER,
        "tokenizer_backend": "huggingface",
        "max_length": 512,
    }
    results = lm_eval.simple_evaluate(
        kind,
        model_args=arguments,
        tasks=["sums"],
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        apply_chat_template=chat,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = results["samples"]["sums"]
    answers = [sample["resps"][0][0] for sample in samples]
    assert len(answers) == len(SUMS)
    assert any(answers)
    assert not any("\n" in answer for answer in answers), answers
    if chat:
        assert sum(total in answer for (_, total), answer in zip(SUMS, answers, strict=True)) >= 2
    print(kind, answers)
