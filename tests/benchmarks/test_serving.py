"""The load generator: its arithmetic, its client, and a small load on a real server."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import serving, serving_checkpoint, serving_machine
from benchmarks.load import Answer, Client, Load, Prompt, closed_loop, percentile, workload
from benchmarks.serving_checkpoint import parse_sizes, read_checkpoint, write_random_checkpoint
from benchmarks.serving_engine import BareEngine, WatchedEngine, decoding_of
from benchmarks.serving_machine import attention_flops, matrix_rates, round_flops
from benchmarks.serving_server import Rounds, Server, model_name, scrape_at_rest
from tests.models.test_attention import use_packed
from tests.models.test_reuse_graphs import run_again
from vdiff_kserve.engine import Engine
from vdiff_kserve.models import Decoder, ReuseGraphs, load_decoder, load_tokenizer
from vdiff_kserve.sampler import DecodingParams

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("random"), parse_sizes("2x64x128"))


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with Server(checkpoint, "--max_num_seqs", "4", "--dtype", "float32") as process:
        yield process


@pytest.fixture(autouse=True)
def rates_are_rough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_machine, "MEASURE_S", 0.02)


def test_percentiles_are_those_of_numpy() -> None:
    values = [0.5, 3.0, 1.0, 2.0, 10.0, 7.0]
    for q in (0, 50, 95, 99, 100):
        assert percentile(values, q) == pytest.approx(np.percentile(values, q))
    assert percentile([4.0], 99) == 4.0


def test_prompts_have_the_lengths_asked_for_and_fit_the_context() -> None:
    prompts = workload(200, 0, range(10, 20), (16, 64), (32, 48), context=90)
    assert {len(p.token_ids) for p in prompts} <= set(range(16, 59))
    assert min(len(p.token_ids) for p in prompts) < 20
    assert {p.max_tokens for p in prompts} == set(range(32, 49))
    assert all(len(p.token_ids) + p.max_tokens <= 90 for p in prompts)
    assert {i for p in prompts for i in p.token_ids} == set(range(10, 20))
    assert prompts == workload(200, 0, range(10, 20), (16, 64), (32, 48), context=90)
    assert prompts != workload(200, 1, range(10, 20), (16, 64), (32, 48), context=90)


def test_a_level_is_summed_up_from_its_answers() -> None:
    answers = [
        Answer(began=0.0, ended=2.0, arrivals=[0.5, 1.0, 2.0], tokens=20, passes=10),
        Answer(began=1.0, ended=4.0, arrivals=[2.0, 4.0], tokens=30, passes=10),
        Answer(began=1.0, ended=1.5, arrivals=[1.2], tokens=99, passes=9, error="429: full"),
    ]
    summary = Load(2, 5.0, 0.5, answers).summary()
    assert summary["requests"] == 3
    assert summary["errors"] == {"429: full": 1}
    assert summary["tokens"] == 50
    assert summary["tokens_per_second"] == 10
    assert summary["requests_per_second"] == pytest.approx(0.4)
    assert summary["tokens_per_forward"] == 2.5
    assert summary["tokens_per_chunk"] == 10
    assert summary["time_to_first_text"]["p50"] == 0.75
    assert summary["time_per_token"]["p50"] == 0.1
    assert summary["inter_chunk"]["p50"] == 1.0
    assert summary["inter_chunk"]["p95"] == pytest.approx(np.percentile([0.5, 1.0, 2.0], 95))
    assert summary["client_share_of_a_core"] == 0.1


def test_operations_are_counted_by_hand() -> None:
    config = parse_sizes("2x64x128")
    rounds = Rounds(
        count=1,
        rows=1,
        passes=1,
        computed=100,
        cached=0,
        attended=10_000,
        committed=2,
        generated=2,
        seconds={},
    )
    square, mlp = 64 * 64, 3 * 64 * 192
    first = 100 * (4 * square + mlp)
    last = 100 * 2 * square + 32 * (2 * square + mlp)
    logits = 17 * 64 * 128
    assert round_flops(config, 32, rounds) == 2 * (first + last + logits)
    assert attention_flops(config, 32, rounds) == 4 * 64 * (100 * 100 + 32 * 100)


def test_rounds_are_the_growth_between_two_looks() -> None:
    before = {("vdiff_round_rows_count", ""): 5.0, ("vdiff_forwards_total", "reuse"): 2.0}
    after = {
        ("vdiff_round_rows_count", ""): 15.0,
        ("vdiff_forwards_total", "reuse"): 4.0,
        ("vdiff_forwards_total", "refresh"): 3.0,
        ("vdiff_forwards_total", "auxiliary"): 9.0,
        ("vdiff_round_seconds_sum", "plan"): 1.0,
        ("vdiff_round_seconds_sum", "forward"): 6.0,
        ("vdiff_round_seconds_sum", "sample"): 2.0,
        ("vdiff_round_seconds_sum", "apply"): 1.0,
    }
    rounds = Rounds.between(before, after)
    assert (rounds.count, rounds.passes) == (10, 5)
    assert rounds.mean_seconds == 1.0
    assert rounds.bookkeeping == 0.2


def test_the_random_checkpoint_has_a_tokenizer_of_its_own_words(checkpoint: Path) -> None:
    spec, token_ids = read_checkpoint(checkpoint)
    assert spec.decoder == parse_sizes("2x64x128")
    assert token_ids == list(range(126))
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.encode(tokenizer.decode([5, 77, 125])) == [5, 77, 125]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_the_random_weights_are_of_one_size_and_differ(checkpoint: Path) -> None:
    weights = stored(checkpoint)
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert (weight == 1).all()
        else:
            assert weight.float().std().item() == pytest.approx(0.06, rel=0.1), name
    first, second = (weights[f"model.transformer.blocks.{i}.up_proj.weight"] for i in range(2))
    assert not torch.equal(first, second)


def test_a_large_random_checkpoint_is_in_several_files(tmp_path: Path, checkpoint: Path) -> None:
    write_random_checkpoint(tmp_path, parse_sizes("2x64x128"), context=96, shard_bytes=50_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    one_file, several = stored(checkpoint), stored(tmp_path)
    assert one_file.keys() == several.keys()
    assert all(torch.equal(several[name], weight) for name, weight in one_file.items())
    _, spec = load_decoder(tmp_path)
    assert spec.max_model_len == 96


def test_a_random_checkpoint_is_written_by_its_command(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    serving_checkpoint.main(["1x64x32", str(folder), "--context", "64", "--device", "cpu"])
    spec, token_ids = read_checkpoint(folder)
    assert spec.decoder == parse_sizes("1x64x32")
    assert (spec.max_model_len, len(token_ids)) == (64, 30)
    with pytest.raises(FileExistsError):
        serving_checkpoint.main(["1x64x32", str(folder)])


def test_wide_models_have_the_heads_of_published_ones() -> None:
    narrow, wide = parse_sizes("12x512x8192"), parse_sizes("32x4096x126464")
    assert (narrow.num_heads, narrow.head_dim) == (8, 64)
    assert (wide.num_heads, wide.num_kv_heads, wide.head_dim) == (32, 32, 128)
    assert (wide.intermediate_size, wide.num_layers) == (12_288, 32)


def test_matrix_rates_are_of_the_device_and_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_machine, "SQUARE", {"cpu": 64})
    rates = matrix_rates(parse_sizes("2x64x128"), CPU, torch.float32)
    assert set(rates) == {"32 tokens", "128 tokens", "512 tokens", "1024 tokens", "square"}
    assert min(rates.values()) > 1e6


@pytest.mark.parametrize("sizes", ["12x512", "12x500x100", "0x64x100", "1x2112x100", "axbxc"])
def test_wrong_sizes_are_told(sizes: str) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_sizes(sizes)


def test_client_and_server_count_the_same(server: Server, checkpoint: Path) -> None:
    _, token_ids = read_checkpoint(checkpoint)
    prompts = workload(7, 0, token_ids, (4, 40), (8, 40), context=2304)
    client = Client(server.url, model_name(server.url), {"cache": "dual"})
    answered = []
    before = scrape_at_rest(server.url)
    load = asyncio.run(closed_loop(client, prompts, 3, lambda: answered.append(1)))
    rounds = Rounds.between(before, scrape_at_rest(server.url))
    wanted = sum(prompt.max_tokens for prompt in prompts)
    assert load.errors == {}
    assert len(answered) == len(load.answers) == len(prompts)
    assert load.tokens == rounds.generated == rounds.committed == wanted
    assert load.summary()["prompt_tokens"] == sum(len(p.token_ids) for p in prompts)
    assert load.summary()["forward_passes"] == rounds.passes == rounds.rows
    assert rounds.count < rounds.rows
    assert 0 < rounds.total_seconds < load.seconds
    for answer in load.answers:
        assert answer.arrivals
        assert answer.began < answer.arrivals[0] <= answer.arrivals[-1] <= answer.ended
        assert answer.arrivals == sorted(answer.arrivals)
        assert len(answer.arrivals) <= answer.tokens


def test_the_bare_engine_does_what_the_server_did(server: Server, checkpoint: Path) -> None:
    _, token_ids = read_checkpoint(checkpoint)
    prompts = workload(5, 1, token_ids, (4, 40), (8, 40), context=2304)
    client = Client(server.url, model_name(server.url), {"cache": "dual", "threshold": 0.02})
    load = asyncio.run(closed_loop(client, prompts, 2))
    decoding = decoding_of(load.whole[0].decoding)
    assert (decoding.cache, decoding.threshold, decoding.logits_eos_inf) == ("dual", 0.02, True)
    assert server.token_budget is not None
    bare = BareEngine.load(checkpoint, CPU, torch.float32, decoding, server.token_budget)
    run = bare.run(prompts, 2, prompts[:1])
    assert run.tokens == load.tokens
    assert run.passes == load.summary()["forward_passes"]


def test_the_bare_engine_captures_no_pass_while_the_clock_runs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_packed(monkeypatch)
    made: list[ReuseGraphs] = []

    def for_model(decoder: Decoder, longest: int) -> ReuseGraphs:
        made.append(ReuseGraphs(decoder, longest, run_again))
        return made[-1]

    monkeypatch.setattr(ReuseGraphs, "for_model", for_model)
    _, token_ids = read_checkpoint(checkpoint)
    *prompts, last = workload(6, 0, token_ids, (20, 20), (64, 64), context=2304)
    decoding = DecodingParams(steps=8, cache="dual", logits_eos_inf=True)
    bare = BareEngine.load(checkpoint, CPU, torch.float32, decoding, 2048)
    engine = bare.start(5, 5, Engine)
    bare.warm_up(engine, [last])
    (graphs,) = made
    warm = set(graphs._captured)
    assert {shape.rows for shape in warm if shape.is_cached} == {1, 2, 4, 8}
    assert any(not shape.is_cached for shape in warm), "no whole pass was captured"
    engine.generate([bare.request(prompt) for prompt in prompts])
    engine.stop()
    assert set(graphs._captured) == warm


def test_steps_of_a_row_are_noted(checkpoint: Path) -> None:
    bare = BareEngine.load(checkpoint, CPU, torch.float32, DecodingParams(cache="dual"), 256)
    engine = bare.start(2, 2, WatchedEngine)
    results = engine.generate([bare.request(Prompt((1, 2, 3), 8)), bare.request(Prompt((4,), 5))])
    engine.stop()
    assert [len(times) for times in engine.steps] == [r.stats.nfe for r in results] == [8, 5]
    first = engine.steps[0]
    assert len(engine.step_times(first[0], first[-1])) == 7 + 4
    assert engine.step_times(first[-1] + 1, math.inf) == []


def test_refusals_are_counted_with_their_reason(server: Server) -> None:
    client = Client(server.url, model_name(server.url))
    prompts = [Prompt((1, 2), 3), Prompt((100_000,), 3), Prompt((1,) * 3000, 3)]
    load = asyncio.run(closed_loop(client, prompts, 1))
    assert len(load.whole) == 1
    assert load.tokens == 3
    too_long, unknown = sorted(load.errors)
    assert too_long.startswith("400: This model's maximum context length is 2304 tokens")
    assert unknown.startswith("400: prompt: token id 100000 is out of vocabulary")


def test_a_stream_that_ends_early_is_an_error() -> None:
    async def cut_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices":[{"text":"a"}]}\n\n')
        await writer.drain()
        writer.close()

    async def run() -> Load:
        async with await asyncio.start_server(cut_off, "127.0.0.1", 0) as fake:
            port = fake.sockets[0].getsockname()[1]
            client = Client(f"http://127.0.0.1:{port}", "any")
            return await closed_loop(client, [Prompt((1,), 1)], 1)

    load = asyncio.run(run())
    assert load.errors == {"the stream ended early": 1}
    assert load.tokens == 0


def test_short_requests_among_long_ones_are_timed_in_rounds(
    server: Server, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "LONG_ROWS", 3)
    report = serving.main(
        [
            *("--base_url", server.url, "--model_dir", str(checkpoint), "--dtype", "float32"),
            *("--scenario", "short_among_long", "--probes", "3", "--new_tokens", "4", "8"),
        ]
    )
    assert report["long_requests"] == report["short_requests"] == 3
    assert 2 < report["rows_per_round"] <= 4
    assert report["round_seconds"] > 0
    first = report["time_to_first_text"]["p95"]
    assert report["in_rounds"]["p95"] == pytest.approx(first / report["round_seconds"])


def test_the_command_compares_and_ends_with_a_line_of_json(
    capsys: pytest.CaptureFixture[str], server: Server, checkpoint: Path
) -> None:
    report = serving.main(
        [
            *("--base_url", server.url, "--model_dir", str(checkpoint), "--dtype", "float32"),
            *("--concurrency", "1", "2", "--requests", "3", "--compare", "2", "--turns", "2"),
            *("--prompt_tokens", "4", "16", "--new_tokens", "8", "16"),
        ]
    )
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == json.loads(json.dumps(report))
    assert [level["concurrency"] for level in report["levels"]] == [1, 2]
    assert {2 * level["tokens"] for level in report["levels"]} == {
        report["compared"]["one_after_the_other"]["tokens"]
    }
    for level in report["levels"]:
        assert level["errors"] == {}
        assert level["server_tokens"] == level["tokens"]
        # Rounds last a little longer than their answers, so neither share bounds the other.
        assert 0 < level["share_of_matrix_rate_by_the_clock"] < 1
        assert 0 < level["share_of_matrix_rate"] < 1
        assert level["share_of_matrix_rate"] < level["share_with_attention"] < 1
        assert 0 < level["bookkeeping"] < 1
    (compared,) = report["compared"]["levels"]
    assert compared["concurrency"] == 2
    assert compared["engine_forward_passes"] == compared["forward_passes"]
    assert compared["forward_passes"] == 2 * report["levels"][1]["forward_passes"]
    assert compared["batching"] > 0
    by_turn = compared["to_bare_engine_by_turn"]
    assert len(by_turn) == 2
    assert min(by_turn) <= compared["to_bare_engine"] <= max(by_turn)


def test_levels_have_requests_of_their_own_and_the_engine_is_compared_alone(
    capsys: pytest.CaptureFixture[str], server: Server, checkpoint: Path
) -> None:
    report = serving.main(
        [
            *("--base_url", server.url, "--model_dir", str(checkpoint), "--dtype", "float32"),
            *("--concurrency", "1", "2", "--requests", "2", "5", "--prompt_tokens", "4", "4"),
            *("--new_tokens", "8", "8", "--fields", '{"policy": "low_confidence", "steps": 4}'),
            *("--compare", "1", "2", "--turns", "1", "--engine_only"),
        ]
    )
    assert "batching" in capsys.readouterr().out
    assert report["device"] == "cpu"
    assert [(level["requests"], level["tokens"]) for level in report["levels"]] == [
        (2, 16),
        (5, 40),
    ]
    assert [level["forward_passes"] for level in report["levels"]] == [8, 20]
    assert report["compared"]["one_after_the_other"]["tokens"] == 0
    for level, passes in zip(report["compared"]["levels"], (8, 20), strict=True):
        assert level["forward_passes"] == level["engine_forward_passes"] == passes
        assert level["to_bare_engine"] > 0
        assert level["to_one_after_the_other"] is None
        assert level["batching"] is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--concurrency", "1", "2", "--requests", "1", "2", "3"],
        ["--context", "64"],
        ["--concurrency", "1", "2", "--compare", "4"],
    ],
)
def test_options_that_contradict_each_other_are_told(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        serving.parse_arguments(arguments)
    assert "error: --" in capsys.readouterr().err
