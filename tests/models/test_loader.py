"""Checkpoint folders: every good layout gives the same model, every bad one an error that helps."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.folders import (
    CONFIG,
    tensors_of,
    write_config,
    write_index,
    write_shards,
    write_single,
)
from vdiff_kserve.models import (
    CheckpointError,
    Decoder,
    ForwardBatch,
    load_causal_decoder,
    load_decoder,
)

TENSORS = tensors_of(CONFIG)
QUERY = "model.transformer.blocks.1.q_proj.weight"


@torch.inference_mode()
def logits_of(decoder: Decoder) -> Tensor:
    ids = torch.tensor([[3, 1, 4, 1, 5, 63, 63, 9]])
    return decoder.logits(decoder(ForwardBatch.dense(ids)))


def refusal(folder: Path) -> str:
    """The message with which `folder` is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_decoder(folder)
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_sharded_checkpoint_equals_the_single_file(tmp_path: Path, shards: int) -> None:
    single, _ = load_decoder(write_single(tmp_path / "single", CONFIG, TENSORS))
    sharded, _ = load_decoder(write_shards(tmp_path / "sharded", CONFIG, TENSORS, shards))
    assert torch.equal(logits_of(sharded), logits_of(single))


def test_index_is_preferred_to_a_single_file_beside_it(tmp_path: Path) -> None:
    """As transformers does not leave both, what the index names is what was meant."""
    folder = write_shards(tmp_path, CONFIG, TENSORS, 2)
    expected = logits_of(load_decoder(folder)[0])
    write_single(folder, CONFIG, tensors_of(CONFIG, seed=1))
    assert torch.equal(logits_of(load_decoder(folder)[0]), expected)


def test_tied_head_is_the_embedding_with_or_without_a_stored_copy(tmp_path: Path) -> None:
    tied = CONFIG | {"weight_tying": True}
    tensors = tensors_of(tied)
    head = {"model.transformer.ff_out.weight": tensors["model.transformer.wte.weight"].clone()}
    untied = load_decoder(write_single(tmp_path / "untied", CONFIG, tensors | head))[0]
    ignored = {"model.transformer.ff_out.weight": torch.zeros(64, 32)}
    for name, extra in (("plain", {}), ("with copy", head), ("with another", ignored)):
        decoder, spec = load_decoder(write_single(tmp_path / name, tied, tensors | extra))
        assert spec.decoder.tie_embeddings
        torch.testing.assert_close(logits_of(decoder), logits_of(untied))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_weights_are_converted_to_the_wanted_dtype(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in TENSORS.items()}
    decoder, _ = load_decoder(write_single(tmp_path, CONFIG, tensors), dtype=wanted)
    assert decoder.dtype == wanted
    assert {parameter.dtype for parameter in decoder.parameters()} == {wanted}
    embedding = tensors["model.transformer.wte.weight"].to(wanted)
    assert torch.equal(decoder.embed_tokens.weight, embedding)
    assert logits_of(decoder).dtype == wanted
    assert logits_of(decoder).isfinite().all()


def test_loaded_model_is_for_inference(tmp_path: Path) -> None:
    decoder, _ = load_decoder(write_single(tmp_path, CONFIG, TENSORS))
    assert not decoder.training
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert not any(parameter.is_meta for parameter in decoder.parameters())


def test_progress_is_shown_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_decoder(write_single(tmp_path / "my-model", CONFIG, TENSORS))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Loading my-model: 100%" in captured.err


def test_what_older_versions_stored_beside_the_weights_is_not_read(tmp_path: Path) -> None:
    expected = logits_of(load_decoder(write_single(tmp_path / "plain", CONFIG, TENSORS))[0])
    extra = {
        f"model.transformer.blocks.0.rotary_emb.{name}": torch.full((4,), torch.nan)
        for name in ("inv_freq", "cos_cached", "sin_cached")
    }
    decoder, _ = load_decoder(write_single(tmp_path / "old", CONFIG, TENSORS | extra))
    assert torch.equal(logits_of(decoder), expected)


def test_all_tensors_that_do_not_fit_are_named_in_one_message(tmp_path: Path) -> None:
    tensors = dict(TENSORS)
    del tensors["model.transformer.ln_f.weight"]
    del tensors[QUERY]
    tensors["model.transformer.blocks.7.q_proj.weight"] = torch.zeros(2)
    tensors["model.transformer.wpe.weight"] = torch.zeros(2)
    tensors["model.transformer.blocks.0.up_proj.weight"] = torch.zeros(48, 31)
    message = refusal(write_single(tmp_path, CONFIG, tensors))
    assert "2 missing: model.transformer.blocks.1.q_proj.weight, model.transformer.ln_f" in message
    assert (
        "2 unexpected: model.transformer.blocks.7.q_proj.weight, model.transformer.wpe" in message
    )
    expected = "1 of the wrong shape: model.transformer.blocks.0.up_proj.weight is [48, 31]"
    assert f"{expected}, config.json says [48, 32]" in message


def test_long_lists_of_tensors_are_cut_but_counted(tmp_path: Path) -> None:
    message = refusal(write_single(tmp_path, CONFIG | {"n_layers": 6}, TENSORS))
    assert "It says 6 layers, the files have 2. 9 or more missing: " in message
    assert message.count("model.transformer.blocks.2.") == 8
    assert message.endswith("...")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_file_that_was_cut_off_is_named(tmp_path: Path, kept: float) -> None:
    folder = write_single(tmp_path, CONFIG, TENSORS)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    message = refusal(folder)
    assert str(file) in message
    assert "damaged or cut off" in message


def test_second_shard_that_was_cut_off_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, CONFIG, TENSORS, 3)
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert str(file) in refusal(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path, file: str) -> None:
    write_config(tmp_path, CONFIG)
    torch.save(TENSORS, tmp_path / file)
    message = refusal(tmp_path)
    assert "pickle" in message
    assert f"python -m vdiff_kserve.convert --pickle_path {tmp_path} --output" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [QUERY, "model.transformer.ln_f.weight"])
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, name: str, value: float, dtype: torch.dtype
) -> None:
    broken = TENSORS[name].clone()
    broken.view(-1)[7] = value
    folder = write_single(tmp_path, CONFIG, TENSORS | {name: broken})
    with pytest.raises(CheckpointError, match=r"norm|q_proj.* not finite"):
        load_decoder(folder, dtype=dtype)


def test_weights_beyond_the_number_type_are_named(tmp_path: Path) -> None:
    folder = write_single(tmp_path, CONFIG, TENSORS | {QUERY: TENSORS[QUERY] * 1e6})
    load_decoder(folder)
    with pytest.raises(CheckpointError, match="not finite in float16"):
        load_decoder(folder, dtype=torch.float16)


def test_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    write_config(tmp_path, CONFIG)
    message = refusal(tmp_path)
    assert "model.safetensors" in message
    assert "model.safetensors.index.json" in message


def test_index_that_names_absent_shards_lists_them(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, CONFIG, TENSORS, 3)
    for shard in (1, 3):
        (folder / f"model-0000{shard}-of-00003.safetensors").unlink()
    message = refusal(folder)
    for shard, absent in ((1, True), (2, False), (3, True)):
        assert (f"model-0000{shard}-of-00003.safetensors" in message) is absent


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", ".."]
)
def test_index_cannot_name_files_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = write_shards(tmp_path / "model", CONFIG, TENSORS, 2)
    write_single(tmp_path, CONFIG, TENSORS)
    (tmp_path / "model.safetensors").rename(tmp_path / "outside.safetensors")
    write_index(folder, dict.fromkeys(TENSORS, name))
    message = refusal(folder)
    assert name in message


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {"a": 5}}'],
)
def test_broken_index_is_named(tmp_path: Path, content: str) -> None:
    folder = write_shards(tmp_path, CONFIG, TENSORS, 2)
    (folder / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    assert "model.safetensors.index.json" in refusal(folder)


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in CONFIG.items() if name != field}


@pytest.mark.parametrize(
    "field",
    [
        "d_model",
        "n_heads",
        "n_layers",
        "mlp_hidden_size",
        "vocab_size",
        "max_sequence_length",
        "rms_norm_eps",
        "rope_theta",
        "rope_full_precision",
        "weight_tying",
        "eos_token_id",
        "architectures",
    ],
)
def test_missing_field_is_named(tmp_path: Path, field: str) -> None:
    message = refusal(write_single(tmp_path, without(field), TENSORS))
    assert f"`{field}`" in message
    assert "missing" in message
    assert "config.json" in message


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("d_model", "32", "positive integer, not '32'"),
        ("d_model", 30, "no even multiple of n_heads = 4"),
        ("n_layers", 0, "positive integer"),
        ("n_heads", True, "positive integer"),
        ("n_kv_heads", 3, "3 does not divide 4"),
        ("rms_norm_eps", -1, "positive number"),
        ("rope_theta", "x", "positive number"),
        ("weight_tying", 1, "true or false"),
        ("mask_token_id", 64, "token id from 0 to 63"),
        ("eos_token_id", -1, "token id from 0 to 63"),
        ("architectures", "LLaDAModelLM", "as a list"),
        ("activation_type", "gelu", "only 'silu'"),
        ("block_type", "sequential", "only 'llama'"),
        ("alibi", True, "only False"),
        ("include_bias", True, "only False"),
        ("rope", False, "only True"),
        ("layer_norm_type", "default", "only 'rms'"),
    ],
)
def test_field_with_a_bad_value_is_named(tmp_path: Path, field: str, value: Any, said: str) -> None:
    message = refusal(write_single(tmp_path, CONFIG | {field: value}, TENSORS))
    assert f"`{field}`" in message
    assert said in message


def test_mask_token_outside_a_small_vocabulary_must_be_stated(tmp_path: Path) -> None:
    """LLaDA-8B's mask token is the default; a smaller model's config has to name its own."""
    message = refusal(write_single(tmp_path, without("mask_token_id"), TENSORS))
    assert "`mask_token_id`" in message


@pytest.mark.parametrize("names", [["GPT2LMHeadModel"], [], ["Qwen2ForCausalLM"]])
def test_unknown_architecture_is_told_what_is_served(tmp_path: Path, names: list[str]) -> None:
    message = refusal(write_single(tmp_path, CONFIG | {"architectures": names}, TENSORS))
    assert (names[0] if names else "nothing") in message
    assert "LLaDAModelLM" in message
    assert "DreamModel" in message


def test_diffusion_model_is_no_auxiliary_model(tmp_path: Path) -> None:
    folder = write_single(tmp_path, CONFIG, TENSORS)
    with pytest.raises(CheckpointError, match="Qwen2ForCausalLM"):
        load_causal_decoder(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "\x00"])
def test_config_that_is_no_json_object_is_named(tmp_path: Path, content: str) -> None:
    write_single(tmp_path, CONFIG, TENSORS)
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    assert str(tmp_path / "config.json") in refusal(tmp_path)


def test_folder_without_config_is_no_checkpoint(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)
    assert "config.json" in refusal(tmp_path / "absent")


def test_what_a_folder_probably_is_instead_is_told(tmp_path: Path) -> None:
    write_single(tmp_path / "inner", CONFIG, TENSORS)
    assert refusal(tmp_path).endswith(f"; did you mean {tmp_path / 'inner'}?")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "an adapter, which must be merged" in refusal(tmp_path)


def test_weights_under_other_names_are_told(tmp_path: Path) -> None:
    weights = write_single(tmp_path, CONFIG, TENSORS) / "model.safetensors"
    weights.rename(tmp_path / "other.safetensors")
    assert "but other.safetensors: rename a single file" in refusal(tmp_path)
    (tmp_path / "other.safetensors").rename(tmp_path / "other.gguf")
    assert "but GGUF, which is not read" in refusal(tmp_path)
    weights.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    assert "model.safetensors is a pointer: run `git lfs pull`" in refusal(tmp_path)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    """Without what they were scaled by, they would be read as a model that writes nonsense."""
    write_single(tmp_path, CONFIG, TENSORS | {QUERY: TENSORS[QUERY].to(torch.int8)})
    assert f"1 stored as integers, quantized in a way that is not read: {QUERY}" in refusal(
        tmp_path
    )


MEASURE = """
import sys
import torch
from vdiff_kserve.models import load_decoder

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

dtype = getattr(torch, sys.argv[3])
load_decoder(sys.argv[1], dtype=dtype)
before = memory("VmRSS")
decoder, _ = load_decoder(sys.argv[2], dtype=dtype)
print(memory("VmHWM") - before, memory("VmRSS") - before)
others = {"torch._dynamo", "torchao", "transformers.modeling_utils"}
print(*others & sys.modules.keys(), file=sys.stderr)
"""
"""Prints the peak and what is left; and on stderr, last, packages that only other models need."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "layers"),
    [
        (torch.float32, 7),
        (torch.bfloat16, 7),
        pytest.param(torch.float32, 22, marks=pytest.mark.slow),  # 1 GB
    ],
)
def test_peak_memory_is_the_model_and_one_shard(
    tmp_path: Path, dtype: torch.dtype, layers: int
) -> None:
    """Counted with mapped pages; an allocator that keeps freed weights exceeds it, too."""
    config = CONFIG | {
        "d_model": 1024,
        "n_heads": 16,
        "n_kv_heads": 16,
        "n_layers": layers,
        "mlp_hidden_size": 2560,
        "embedding_size": 4096,
        "vocab_size": 4096,
    }
    tensors = tensors_of(config)
    folder = write_shards(tmp_path / "large", config, tensors, 8)
    small = write_single(tmp_path / "small", CONFIG, TENSORS)
    model = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    del tensors
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert model > 25e6 * layers
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(folder), str(dtype).split(".")[1]],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    if not torch.cuda.is_available():  # there, other packages may import them
        assert child.stderr.splitlines()[-1] == "", "a second or two of imports for nothing"
    peak, afterwards = map(int, child.stdout.split())
    slack = 25e6
    assert peak < model + shard + slack
    assert afterwards < model + slack
