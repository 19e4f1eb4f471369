"""A short real run of guidellm, as benchmarks/README.md has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

folder = Path(sys.argv[1])
tokenizer = sys.argv[2]
target = os.environ["BASE_URL"].removesuffix("/v1")
report = folder / "report.json"
command = [
    str(Path(sys.executable).with_name("guidellm")), "run",
    "--backend", f"kind=openai_http,target={target},model=llada",
    "--profile", "kind=concurrent,streams=2",
    "--constraint", "kind=max_requests,count=6",
    "--tokenizer", f"kind=hf_auto,model={tokenizer}",
    "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=32",
    "--output", f"kind=json,path={report}",
    "--disable-console-interactive",
]  # fmt: skip
subprocess.run(command, check=True)
(benchmark,) = json.loads(report.read_text())["benchmarks"]
print(json.dumps(benchmark["metrics"]["request_totals"]))
assert benchmark["metrics"]["request_totals"]["successful"] == 6
assert benchmark["metrics"]["request_totals"]["errored"] == 0
