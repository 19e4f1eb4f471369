"""The GPU benchmark runs on any machine, small; its roofline is that of hand-counted passes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import (
    BLOCK,
    Rates,
    Timing,
    all_that_work,
    config_of,
    main,
    parse_arguments,
    roofline,
)
from benchmarks.gpu_models import random_decoder
from vdiff_kserve.models import Decoder

SMALL = ["--device", "cpu", "--dtype", "float32", "--layers", "2", "--width", "128"]
SMALL += ["--vocabulary", "300", "--quick"]


def test_llada_8b_is_the_default_shape() -> None:
    config = config_of(parse_arguments([]))
    layer = 4 * 4096**2 + 3 * 4096 * 12288
    assert config.num_layers * layer + 2 * config.vocab_size * 4096 == pytest.approx(
        8.0e9, rel=0.01
    )


def test_a_pass_of_few_tokens_takes_as_long_as_reading_the_weights() -> None:
    config = config_of(parse_arguments([]))
    weights = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    seconds = roofline(config, Rates(1e12, 1e18, 1e18, 2), [BLOCK], [0], itemsize=2)
    assert seconds == pytest.approx(weights / 1e12)


def test_a_long_pass_takes_as_long_as_its_products() -> None:
    config = config_of(parse_arguments(["--layers", "1"]))
    key_value, rest = 2 * 4096**2, 2 * 4096**2 + 3 * 4096 * 12288
    attention = 2 * 4096 * BLOCK * 8192
    products = key_value * 8192 + rest * BLOCK + attention
    seconds = roofline(config, Rates(1e18, 1e12, 1e12, 2), [8192], [8192], itemsize=2)
    assert seconds == pytest.approx(2 * products / 1e12)


def test_in_fp8_a_weight_is_a_byte_and_linear_layers_have_a_rate_of_their_own() -> None:
    config = config_of(parse_arguments(["--layers", "1"]))
    layer = 4 * 4096**2 + 3 * 4096 * 12288
    cached = 2 * 4096 * 1000
    seconds = roofline(config, Rates(1e12, 1e18, 1e18, 1), [BLOCK], [1000], itemsize=2)
    assert seconds == pytest.approx((layer + 2 * cached) / 1e12)
    attention = 2 * 4096 * BLOCK * 1000
    seconds = roofline(config, Rates(1e18, 1e12, 2e12, 1), [BLOCK], [1000], itemsize=2)
    assert seconds == pytest.approx(2 * layer * BLOCK / 2e12 + 2 * attention / 1e12)


def test_a_model_in_fp8_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    report = main([*SMALL, "--quantization", "fp8"])
    assert report["failures"] == []
    assert report["linear_rate"] > 0
    assert "quantization fp8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="dense models"):
        main([*SMALL, "--model", "llada2-mini", "--quantization", "fp8"])


def test_llada2_mini_reads_the_experts_that_its_tokens_choose() -> None:
    config = config_of(parse_arguments(["--model", "llada2-mini"]))
    with torch.device("meta"):
        parameters = sum(each.numel() for each in Decoder(config).parameters())
    assert parameters == pytest.approx(16.2e9, rel=0.01)
    attention = 2048 * 128 * (2 * 16 + 2 * 4)
    dense, one = 3 * 2048 * 5120, 3 * 2048 * 512
    for tokens, chosen in ((1, 8), (100_000, 256)):
        seconds = roofline(config, Rates(1e12, 1e30, 1e30, 2), [tokens], [0], itemsize=2)
        experts = chosen if tokens == 1 else (18 * 256 + 256 * (1 - (1 - 8 / 256) ** BLOCK)) / 19
        if tokens == 1:  # the last layer computes a block
            experts = (18 * 8 + 256 * (1 - (1 - 8 / 256) ** BLOCK)) / 19
        read = 20 * attention + dense + 19 * (2048 * (256 + 3 * 512) + one * experts)
        assert seconds == pytest.approx(2 * read / 1e12)


def test_a_block_causal_model_of_experts_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    report = main([*SMALL, "--model", "llada2-mini"])
    assert report["failures"] == []
    assert report["tokens_per_second"]["1"] > 0


def test_a_router_keeps_its_precision() -> None:
    args = parse_arguments([*SMALL, "--model", "llada2-mini"])
    decoder = random_decoder(config_of(args), torch.device("cpu"), torch.bfloat16)
    assert decoder.layers[1].mlp.router.weight.dtype == torch.float32
    assert decoder.dtype == torch.bfloat16


def test_every_figure_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report = main(SMALL)
    assert [each["name"] for each in report["passes"]] == ["reuse, 1 rows", "refresh, 1024 tokens"]
    assert all(each["share"] > 0 for each in report["passes"])
    assert report["tokens_per_second"]["1"] > 0
    assert report["round_seconds"]["1"] > 0
    printed = capsys.readouterr().out
    assert "roofline ms" in printed
    assert "tokens/s" in printed


def test_what_fails_is_told_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(size: int) -> Timing:
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Timing(f"{size} rows", 0.01, 0.005)

    failures: list[str] = []
    timings = all_that_work(measure, [1, 16, 4], "Reuse", failures)
    assert [timing.name for timing in timings] == ["1 rows", "4 rows"]
    assert failures == ["Reuse 16: OutOfMemoryError: CUDA out of memory"]
    assert failures[0] in capsys.readouterr().out


def test_a_measurement_that_fails_does_not_lose_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Timing:
        raise RuntimeError("illegal memory access\nand more")

    monkeypatch.setattr(gpu, "measure_reuse", fail)
    monkeypatch.setattr(gpu, "measured_token_budget", fail)
    report = main(SMALL)
    assert [each["name"] for each in report["passes"]] == ["refresh, 1024 tokens"]
    message = "RuntimeError: illegal memory access"
    assert report["failures"] == [f"Reuse 1: {message}", f"Answers: {message}"]
    assert f"failed: Answers: {message}" in capsys.readouterr().out


def test_it_needs_no_server_packages() -> None:
    """It runs where torch, transformers, safetensors and accelerate are installed."""
    hidden = ["kserve", "ray", "fastapi", "starlette", "uvicorn", "grpc", "prometheus_client"]
    hidden += ["pydantic", "limits", "grpc_interceptor", "llguidance", "torchao"]
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); import benchmarks.gpu"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=300)
