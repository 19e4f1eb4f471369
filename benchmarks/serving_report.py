"""What `benchmarks.serving` found out, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GIGA = 1e9


def show(report: Mapping[str, Any]) -> None:
    """Print the tables of a report."""
    print(
        f"\n{report['device']}, {report['dtype']}, {report['cores']} cores, "
        f"{report['threads']} threads, context {report['context']}"
    )
    {"load": _load, "short_among_long": _short, "long_prompt": _long}[report["scenario"]](report)


def _load(report: Mapping[str, Any]) -> None:
    _machine(report["matrix_rates"])
    _levels(report["levels"])
    _times(report["levels"])
    _rounds(report["levels"])
    if "compared" in report:
        _compared(report["compared"])


def _machine(rates: Mapping[str, float]) -> None:
    print("\nmatrix products of one layer (GFLOP/s), and one large square product")
    print("  ".join(f"{name}: {rate / GIGA:.0f}" for name, rate in rates.items()))


def _levels(levels: list[dict[str, Any]]) -> None:
    print(
        f"\n{'in flight':>9} {'requests':>8} {'errors':>6} {'tokens':>7} {'tokens/s':>9} "
        f"{'requests/s':>10} {'tokens/pass':>11} {'tokens/chunk':>12} {'client':>7}"
    )
    for level in levels:
        print(
            f"{level['concurrency']:9d} {level['requests']:8d} "
            f"{sum(level['errors'].values()):6d} {level['tokens']:7d} "
            f"{level['tokens_per_second']:9.1f} {level['requests_per_second']:10.2f} "
            f"{level['tokens_per_forward']:11.2f} {level['tokens_per_chunk']:12.2f} "
            f"{level['client_share_of_a_core']:7.1%}"
        )
    for level in levels:
        for error, count in level["errors"].items():
            print(f"{level['concurrency']} in flight, {count} times: {error}")


def _times(levels: list[dict[str, Any]]) -> None:
    titles = {
        "time_to_first_text": "first text",
        "time_per_token": "per token",
        "inter_chunk": "between chunks",
    }
    print("\nmilliseconds, p50 / p95 / p99")
    print(f"{'in flight':>9} " + " ".join(f"{title:>26}" for title in titles.values()))
    for level in levels:
        cells = [
            " / ".join(f"{seconds * 1000:.1f}" for seconds in level[name].values())
            for name in titles
        ]
        print(f"{level['concurrency']:9d} " + " ".join(f"{cell:>26}" for cell in cells))


def _rounds(levels: list[dict[str, Any]]) -> None:
    print("\nwhat the engine's rounds did; share of the best layer rate above")
    print(
        f"{'in flight':>9} {'rows':>6} {'round ms':>9} {'plan+apply':>10} {'forward':>8} "
        f"{'sample':>7} {'GFLOP/s':>8} {'share':>7} {'+attention':>10} {'by the clock':>12}"
    )
    for level in levels:
        phases = level["phase_seconds"]
        total = sum(phases.values()) or 1.0
        print(
            f"{level['concurrency']:9d} {level['rows_per_round']:6.1f} "
            f"{level['round_seconds'] * 1000:9.1f} {level['bookkeeping']:10.1%} "
            f"{phases['forward'] / total:8.1%} {phases['sample'] / total:7.1%} "
            f"{level['gflops_in_rounds']:8.1f} {level['share_of_matrix_rate']:7.1%} "
            f"{level['share_with_attention']:10.1%} "
            f"{level['share_of_matrix_rate_by_the_clock']:12.1%}"
        )


def _compared(compared: Mapping[str, Any]) -> None:
    alone = compared["one_after_the_other"]
    print(f"\nthe same requests in {compared['turns']} turns", end="")
    if alone["tokens_per_second"] is not None:
        rate = alone["tokens_per_second"]
        print(f"; one after the other: {rate:.1f} tokens/s, {alone['errors']} errors", end="")
    print()
    print(
        f"{'in flight':>9} {'tokens/s':>9} {'to that':>8} {'batching':>8} {'bare engine':>11} "
        f"{'to it':>7} {'by turn':>15} {'passes':>8} {'its passes':>10} {'its plan+apply':>14}"
    )
    for level in compared["levels"]:
        by_turn = level["to_bare_engine_by_turn"]
        print(
            f"{level['concurrency']:9d} {level['tokens_per_second']:9.1f} "
            f"{_times_of(level['to_one_after_the_other'])} {_times_of(level['batching'])} "
            f"{level['engine_tokens_per_second']:11.1f} "
            f"{level['to_bare_engine']:7.1%} {min(by_turn):6.1%} - {max(by_turn):6.1%} "
            f"{level['forward_passes']:8d} {level['engine_forward_passes']:10d} "
            f"{level['engine_bookkeeping']:14.1%}"
        )


def _times_of(factor: float | None) -> str:
    return f"{'-' if factor is None else f'{factor:.2f}x':>8}"


def _short(report: Mapping[str, Any]) -> None:
    first, rounds = report["time_to_first_text"], report["in_rounds"]
    print(
        f"\n{report['short_requests']} short requests, one at a time, among "
        f"{report['long_requests']} long ones ({report['rows_per_round']:.1f} rows in a round)\n"
        f"a round takes {report['round_seconds'] * 1000:.1f} ms"
    )
    for q, seconds in first.items():
        print(f"first chunk, {q}: {seconds * 1000:8.1f} ms, {rounds[q]:.2f} rounds")


def _long(report: Mapping[str, Any]) -> None:
    budget = report["budget_seconds"]
    print(
        f"\n{report['running_rows']} rows run; a prompt of {report['prompt_tokens']} tokens "
        f"arrives; whole passes take at most {report['token_budget']} tokens of a round"
    )
    print("a row's step, milliseconds, p50 / p95 / p99 / longest")
    for name, when in (("step_before", "before"), ("step_during", "meanwhile")):
        cells = " / ".join(f"{seconds * 1000:.1f}" for seconds in report[name].values())
        print(f"{when:<33} {cells}")
    for name in (
        "stretch_of_the_usual_step",
        "stretch_of_the_longest_step",
        "longest_step_over_the_usual_one",
    ):
        words = name.replace("_", " ")
        print(f"{words:<33} {report[name] * 1000:.1f} of a budget of {budget * 1000:.0f}")
    print(f"the long prompt is answered after {report['answered_after']['p50']:.2f} s (p50)")
