"""Quality against speed: `python -m benchmarks.quality --sweep`, over policies, caches and knobs.

Every setting answers the same held-out prompts. The defaults of the server follow from the result
by one rule: the fastest setting whose exact match is within one point of exact decoding.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hack.embedded.example import Example
from vdiff_kserve.engine import Engine, EngineConfig, GenerationRequest
from vdiff_kserve.models import (
    choose_device,
    choose_dtype,
    load_causal_decoder,
    load_decoder,
    load_tokenizer,
    with_end_of_turn,
)
from vdiff_kserve.sampler import DecodingParams

ROWS = 32
APD_CURVE = "apd, auxiliary model"
POINTS_LOST = 1.0
"""How many points of exact match the default may lose to exact decoding."""


@dataclass(frozen=True)
class Trial:
    """One decoding to try.

    Attributes:
        curve: trials of one curve differ in one knob only.
        knob: its value, for the table.
        auxiliary: whether the auxiliary model is loaded.
    """

    curve: str
    knob: str
    decoding: DecodingParams
    auxiliary: bool = False


@dataclass
class Outcome:
    """What a trial reached: counts over all prompts."""

    trial: Trial
    seconds: float = 0.0
    tokens: int = 0
    forwards: int = 0
    auxiliary_forwards: int = 0
    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    prompts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def accuracy(self) -> float:
        """Exact match in percent."""
        return 100 * sum(self.right.values()) / sum(self.prompts.values())

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def summary(self) -> dict[str, object]:
        """The figures as JSON."""
        return {
            "curve": self.trial.curve,
            "knob": self.trial.knob,
            "exact_match": round(self.accuracy, 2),
            "tokens_per_forward": round(self.tokens_per_forward, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "forwards": self.forwards,
            "auxiliary_forwards": self.auxiliary_forwards,
            "tasks": {
                task: round(100 * self.right[task] / n, 1) for task, n in self.prompts.items()
            },
        }


CURVES: tuple[tuple[str, str, str, tuple[float, ...], dict[str, object]], ...] = (
    ("threshold, none", "threshold", "threshold", (0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6), {}),
    (
        "threshold, prefix",
        "threshold",
        "threshold",
        (0.98, 0.95, 0.9, 0.8, 0.7),
        {"cache": "prefix"},
    ),
    ("threshold, dual", "threshold", "threshold", (0.98, 0.95, 0.9, 0.8, 0.7), {"cache": "dual"}),
    (
        "threshold, dual, lookahead 64",
        *("threshold", "threshold", (0.9, 0.8)),
        {"cache": "dual", "max_lookahead": 64},
    ),
    ("factor", "factor", "factor", (0.5, 1.0, 2.0), {}),
    ("entropy_bound", "entropy_bound", "entropy_bound", (0.05, 0.2, 0.5), {}),
    ("local", "local", "threshold", (0.9, 0.8), {}),
    ("credit", "credit", "threshold", (0.9, 0.8), {}),
    (
        "apd by confidence",
        *("apd", "apd_threshold", (0.99, 0.98, 0.95, 0.9, 0.8, 0.7)),
        {"apd_max_parallel": 16},
    ),
    (
        APD_CURVE,
        *("apd", "apd_mixture_weight", (0.3, 0.5, 0.7, 0.8, 0.9)),
        {"apd_max_parallel": 16},
    ),
)
"""(curve, policy, knob, its values from careful to bold, further parameters)."""


def trials(block_length: int) -> list[Trial]:
    """Exact decoding first, then every curve."""
    found = [Trial("exact", "1 per step", DecodingParams(block_length=block_length))]
    found += [
        Trial(f"exact, {cache}", "1 per step", replace(found[0].decoding, cache=cache))
        for cache in ("prefix", "dual")
    ]
    for curve, policy, knob, values, more in CURVES:
        for value in values:
            changes: dict[str, Any] = {"policy": policy, knob: value, **more}
            decoding = replace(found[0].decoding, **changes)
            found.append(Trial(curve, f"{value}", decoding, auxiliary=curve == APD_CURVE))
    return found


def run(
    folder: Path, suite: Sequence[Example], max_tokens: int, chosen: Sequence[Trial]
) -> list[Outcome]:
    """Answer the suite with every trial."""
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    decoder, spec = load_decoder(folder, device, dtype)
    auxiliary = load_causal_decoder(folder / "apd", device, dtype)
    tokenizer = load_tokenizer(folder)
    ends = with_end_of_turn(spec, tokenizer).end_token_ids
    prompts = [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": example.prompt}], return_dict=False
            )
        )
        for example in suite
    ]
    engines = {
        checked: Engine(
            decoder,
            spec,
            EngineConfig(max_num_seqs=ROWS, max_queue=len(suite)),
            auxiliary if checked else None,
        )
        for checked in (False, True)
    }
    for engine in engines.values():
        engine.start()
    outcomes = []
    for trial in (progress := tqdm(chosen, unit="trial")):
        progress.set_description(f"{trial.curve} {trial.knob}")
        requests = [GenerationRequest(p, max_tokens, trial.decoding, ends) for p in prompts]
        outcome = Outcome(trial)
        began = time.perf_counter()
        results = engines[trial.auxiliary].generate(requests)
        outcome.seconds = time.perf_counter() - began
        for example, result in zip(suite, results, strict=True):
            outcome.prompts[example.task] += 1
            text = tokenizer.decode(result.token_ids, skip_special_tokens=True)
            outcome.right[example.task] += text == example.answer
            outcome.tokens += result.stats.completion_tokens
            outcome.forwards += result.stats.nfe
            outcome.auxiliary_forwards += result.stats.auxiliary
        outcomes.append(outcome)
    for engine in engines.values():
        engine.stop()
    return outcomes


def area_under_parallelism(points: Sequence[tuple[float, float]]) -> float:
    """AUP of d3LLM: the area under accuracy over tokens per forward, weighted by what is kept.

    Points whose accuracy is more than 5 below that of the slowest are dropped; the weight of an
    accuracy y is min(exp(-3 (1 - y / y_max)), 1).

    Args:
        points: (tokens per forward, accuracy in percent).
    """
    ordered = sorted(points)
    kept = [(x, y) for x, y in ordered if y >= ordered[0][1] - 5]
    best = max(y for _, y in kept)

    def weighted(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / best)), 1.0) if best else 0.0

    area = kept[0][0] * kept[0][1]
    for (x0, y0), (x1, y1) in pairwise(kept):
        area += 0.5 * (x1 - x0) * (weighted(y1) + weighted(y0))
    return area


def fastest_within(outcomes: Sequence[Outcome], points: float = POINTS_LOST) -> Outcome:
    """The rule of the defaults; the first outcome is exact decoding."""
    least = outcomes[0].accuracy - points
    return max((o for o in outcomes if o.accuracy >= least), key=lambda o: o.tokens_per_second)


def print_table(outcomes: Sequence[Outcome]) -> None:
    """One line per trial, then AUP per curve and the choice."""
    print(f"\n{'curve':<32} {'knob':<11} {'exact match':>11} {'tokens/fwd':>11} {'tokens/s':>9}")
    for o in outcomes:
        print(
            f"{o.trial.curve:<32} {o.trial.knob:<11} {o.accuracy:10.1f}% "
            f"{o.tokens_per_forward:11.2f} {o.tokens_per_second:9.0f}"
        )
    print(f"\n{'curve':<32} {'AUP':>8}")
    for curve, area in areas(outcomes).items():
        print(f"{curve:<32} {area:8.1f}")
    choice = fastest_within(outcomes)
    print(
        f"\nFastest within {POINTS_LOST:g} point of exact decoding: {choice.trial.curve} "
        f"{choice.trial.knob}, {choice.accuracy:.1f}% at {choice.tokens_per_forward:.2f} tokens "
        f"per forward, {choice.tokens_per_second / outcomes[0].tokens_per_second:.1f} times the "
        "tokens per second."
    )


def areas(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """AUP of every curve, exact decoding as its first point."""
    exact = outcomes[0]
    curves: dict[str, list[tuple[float, float]]] = {}
    for o in outcomes[1:]:
        curve = curves.setdefault(o.trial.curve, [(exact.tokens_per_forward, exact.accuracy)])
        curve.append((o.tokens_per_forward, o.accuracy))
    return {curve: area_under_parallelism(points) for curve, points in curves.items()}


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """The frontier as a picture: exact match over tokens per forward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=110)
    exact = outcomes[0]
    curves: dict[str, list[Outcome]] = {}
    for o in outcomes[1:]:
        curves.setdefault(o.trial.curve, []).append(o)
    for curve, members in curves.items():
        members = sorted(members, key=lambda o: o.tokens_per_forward)
        x = [o.tokens_per_forward for o in members]
        axes.plot(x, [o.accuracy for o in members], marker="o", markersize=4, label=curve)
    axes.plot(exact.tokens_per_forward, exact.accuracy, "k*", markersize=12, label="exact")
    axes.axhline(exact.accuracy - POINTS_LOST, color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("tokens per forward pass")
    axes.set_ylabel("exact match, %")
    axes.set_title("Embedded model, held-out prompts: quality against parallelism")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def report(outcomes: Sequence[Outcome], path: Path | None, picture: Path | None) -> None:
    """Print the table; write the JSON and the picture where asked."""
    print_table(outcomes)
    if path is not None:
        choice = fastest_within(outcomes)
        data = {
            "outcomes": [o.summary() for o in outcomes],
            "aup": {curve: round(area, 1) for curve, area in areas(outcomes).items()},
            "choice": {"curve": choice.trial.curve, "knob": choice.trial.knob},
        }
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if picture is not None:
        plot(outcomes, picture)
