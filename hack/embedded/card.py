"""The model card and the picture of the loss that ship beside the weights."""

import json
import math
from pathlib import Path
from string import Template

import matplotlib
import torch
from safetensors import safe_open

from hack.embedded.training import Progress

matplotlib.use("Agg")

import matplotlib.pyplot as plt

CARD = Path(__file__).with_name("model_card.md")


def read_progress(checkpoint: Path) -> Progress:
    """The bookkeeping of a training checkpoint."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return Progress(**state["progress"])


def _draw(panel: plt.Axes, progress: Progress, title: str) -> None:
    steps, losses, accuracies = zip(*progress.history, strict=True)
    panel.plot(steps, losses, color="tab:blue", linewidth=0.8)
    panel.set_yscale("log")
    panel.set_xlabel("step")
    panel.set_ylabel("loss", color="tab:blue")
    right = panel.twinx()
    right.plot(steps, accuracies, color="tab:orange", linewidth=0.8)
    right.set_ylabel("token accuracy", color="tab:orange")
    panel.set_title(title)


def draw_losses(diffusion: Progress, causal: Progress, path: Path) -> None:
    """Loss and accuracy over the steps of both models."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6))
    _draw(panels[0], diffusion, "diffusion model")
    _draw(panels[1], causal, "causal model (APD)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _table(report: dict[str, object]) -> str:
    """The report of `benchmarks.quality` as a Markdown table."""
    tasks = report["tasks"]
    assert isinstance(tasks, dict)
    lines = ["| task | exact match | tokens per forward |", "|---|---|---|"]
    for name, row in tasks.items():
        lines.append(f"| {name} | {row['exact_match']:.1%} | {row['tokens_per_forward']:.2f} |")
    return "\n".join(lines)


def _parameters(weights: Path) -> int:
    with safe_open(str(weights), framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def write_card(out: Path, build: Path, seed: int) -> None:
    """README.md and loss.png, from the checkpoints and the last quality reports in `build`."""
    diffusion = read_progress(build / "checkpoint.pt")
    causal = read_progress(build / "causal.pt")
    draw_losses(diffusion, causal, out / "loss.png")
    reports = [json.loads(file.read_text()) for file in sorted(build.glob("quality-*.json"))]
    sections = [f"`{report['command']}`\n\n{_table(report)}" for report in reports]
    text = Template(CARD.read_text()).substitute(
        parameters=f"{_parameters(out / 'model.safetensors'):,}",
        causal_parameters=f"{_parameters(out / 'apd' / 'model.safetensors'):,}",
        seed=seed,
        steps=f"{diffusion.step:,}",
        tokens=f"{diffusion.tokens / 1e6:.1f} million",
        minutes=f"{diffusion.seconds / 60:.0f}",
        causal_steps=f"{causal.step:,}",
        causal_minutes=f"{causal.seconds / 60:.0f}",
        quality="\n\n".join(sections) or "Not measured yet.",
    )
    (out / "README.md").write_text(text)
