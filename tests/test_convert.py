"""Checkpoints of training runs: what two ranks wrote becomes a folder that serves the same."""

from __future__ import annotations

import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from tests.dcp import write
from tests.golden import GOLDEN_DIR
from tests.hack.hub import Hub
from tests.models.folders import CONFIG, tensors_of, write_config, write_single
from tests.server.checkpoint import make_checkpoint
from tests.server.process import ServerProcess
from vdiff_kserve.checkpoint import find_checkpoint
from vdiff_kserve.config import ServerConfig
from vdiff_kserve.convert import Conversion, convert, main, verify_checksums
from vdiff_kserve.models import CheckpointError, load_decoder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ROOT = Path(__file__).parents[1]
FAMILIES = ("llada", "dream")
TENSORS = tensors_of(CONFIG)
NORM = "model.transformer.ln_f.weight"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [GOLDEN_DIR / family / "model.safetensors" for family in FAMILIES]
    return write(tmp_path_factory.mktemp("runs"), files)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_single(tmp_path / "base", CONFIG, TENSORS)
    (folder / "modeling_llada.py").write_text("raise SystemExit", encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder


def save(folder: Path, tensors: dict[str, torch.Tensor], prefix: str = "model.") -> Path:
    """A directory that one process wrote."""
    dcp.save(
        {prefix + name: tensor for name, tensor in tensors.items()},
        checkpoint_id=folder,
        no_dist=True,
    )
    return folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("layout", ["whole", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_golden_weights_of_two_ranks_come_back(
    runs: Path, tmp_path: Path, family: str, layout: str
) -> None:
    base = GOLDEN_DIR / family
    expected = load_file(base / "model.safetensors")
    most = sum(tensor.nbytes for tensor in expected.values()) // 4
    convert(Conversion(runs / family / layout, str(base), shard_bytes=most), tmp_path / "out")
    found = tensors_in(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    largest = max(tensor.nbytes for tensor in expected.values())
    assert all(file.stat().st_size < max(most, largest) + 10_000 for file in shards)
    _, spec = load_decoder(tmp_path / "out")
    assert spec.family == family


def test_the_folder_has_what_a_server_needs_and_no_code(base: Path, tmp_path: Path) -> None:
    convert(Conversion(save(tmp_path / "run", TENSORS), str(base)), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "chat_template.jinja", "SHA256SUMS"} <= names
    assert "modeling_llada.py" not in names
    assert "model.safetensors" not in names
    subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "out", check=True
    )


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("base", torch.float32), ("keep", torch.bfloat16), ("float16", torch.float16)],
)
def test_the_number_type_is_the_base_s_or_the_run_s_or_named(
    base: Path, tmp_path: Path, dtype: str, expected: torch.dtype
) -> None:
    run = save(tmp_path / "run", {n: t.bfloat16() for n, t in TENSORS.items()})
    convert(Conversion(run, str(base), dtype=dtype), tmp_path / "out")
    found = tensors_in(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {expected}
    assert torch.equal(found[NORM], TENSORS[NORM].bfloat16().to(expected))


def test_a_run_that_was_stopped_goes_on(base: Path, tmp_path: Path) -> None:
    run, output = save(tmp_path / "run", TENSORS), tmp_path / "out"
    conversion = Conversion(run, str(base), shard_bytes=10_000)
    convert(conversion, output)
    files = sorted(output.glob("*.safetensors"))
    contents = {file: file.read_bytes() for file in files}
    (output / "model.safetensors.index.json").unlink()
    files[1].unlink()
    files[2].write_bytes(contents[files[2]][:-1] + b"?")
    untouched = {file: file.stat().st_ino for file in files if file not in files[1:3]}
    convert(conversion, output)
    assert {file: file.read_bytes() for file in files} == contents
    assert {file: file.stat().st_ino for file in untouched} == untouched
    assert files[2].stat().st_ino not in untouched.values()
    assert verify_checksums(output) == []
    files[0].write_bytes(b"?")
    assert verify_checksums(output) == [files[0].name]


def test_a_folder_with_something_else_is_left_alone(base: Path, tmp_path: Path) -> None:
    run, output = save(tmp_path / "run", TENSORS), tmp_path / "out"
    convert(Conversion(run, str(base)), output)
    with pytest.raises(CheckpointError, match="conversion of another"):
        convert(Conversion(run, str(base), dtype="float16"), output)
    with pytest.raises(CheckpointError, match="not empty"):
        convert(Conversion(run, str(base)), base)


def test_what_does_not_fit_the_base_model_is_named(base: Path, tmp_path: Path) -> None:
    tensors = dict(TENSORS)
    tensors[NORM] = torch.ones(31)
    del tensors["model.transformer.wte.weight"]
    run = save(tmp_path / "run", tensors)
    with pytest.raises(CheckpointError) as caught:
        convert(Conversion(run, str(base)), tmp_path / "out")
    assert "model.model.transformer.wte.weight is missing" in str(caught.value)
    assert f"model.{NORM} is [31], the base's [32]" in str(caught.value)


def test_a_head_may_be_missing_only_where_it_is_the_embedding(tmp_path: Path) -> None:
    head = "model.transformer.ff_out.weight"
    run = save(tmp_path / "run", {n: t for n, t in TENSORS.items() if n != head})
    tied = write_single(tmp_path / "tied", CONFIG | {"weight_tying": True}, TENSORS)
    convert(Conversion(run, str(tied)), tmp_path / "out")
    assert head not in tensors_in(tmp_path / "out")
    untied = write_single(tmp_path / "untied", CONFIG, TENSORS)
    with pytest.raises(CheckpointError, match=f"{head} is missing"):
        convert(Conversion(run, str(untied)), tmp_path / "other")


def test_a_run_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    run = save(tmp_path / "run", {"encoder.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"under any prefix; it has model\.encoder\.weight"):
        convert(Conversion(run, str(base)), tmp_path / "out")


def test_two_models_in_one_run_need_a_prefix(base: Path, tmp_path: Path) -> None:
    average = {f"average.{name}": tensor + 1 for name, tensor in TENSORS.items()}
    run = save(tmp_path / "run", TENSORS | average, prefix="")
    conversion = Conversion(run, str(base))
    with pytest.raises(CheckpointError, match=r"several prefixes, '', 'average\.': .*--prefix"):
        convert(conversion, tmp_path / "out")
    convert(replace(conversion, prefix="average."), tmp_path / "average")
    assert torch.equal(tensors_in(tmp_path / "average")[NORM], TENSORS[NORM] + 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(base: Path, tmp_path: Path, value: float) -> None:
    broken = TENSORS[NORM].clone()
    broken[5] = value
    run = save(tmp_path / "run", TENSORS | {NORM: broken})
    with pytest.raises(CheckpointError, match=f"model.{NORM} has values that are not finite"):
        convert(Conversion(run, str(base)), tmp_path / "out")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_file_that_was_cut_off_is_told(base: Path, tmp_path: Path, kept: float) -> None:
    run = save(tmp_path / "run", TENSORS)
    file = run / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(Conversion(run, str(base)), tmp_path / "out")


def test_a_missing_file_is_told(base: Path, tmp_path: Path) -> None:
    run = save(tmp_path / "run", TENSORS)
    (run / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        convert(Conversion(run, str(base)), tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no DCP directory"),
        (b"", "damaged or not torch's"),
        (b"\x80\x04", "damaged or not torch's"),
        (pickle.dumps({"a": 1}), "holds no DCP metadata"),
    ],
)
def test_metadata_that_is_none_is_told(
    base: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert(Conversion(tmp_path, str(base)), tmp_path / "out")


class Attack:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.proof}",)


def test_metadata_cannot_run_code(base: Path, tmp_path: Path) -> None:
    run = save(tmp_path / "run", TENSORS)
    proof = tmp_path / "proof"
    (run / ".metadata").write_bytes(pickle.dumps(Attack(proof)))
    with pytest.raises(CheckpointError, match=r"posix\.system, which could run code"):
        convert(Conversion(run, str(base)), tmp_path / "out")
    assert not proof.exists()


def test_metadata_cannot_name_files_elsewhere(base: Path, tmp_path: Path) -> None:
    run = save(tmp_path / "run", TENSORS)
    metadata = pickle.loads((run / ".metadata").read_bytes())
    for stored in metadata.storage_data.values():
        stored.relative_path = f"../run/{stored.relative_path}"
    (run / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="files outside its folder"):
        convert(Conversion(run, str(base)), tmp_path / "out")


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
def test_a_run_under_any_python_is_read(base: Path, tmp_path: Path, module: bytes) -> None:
    run = save(tmp_path / "run", TENSORS)
    metadata = pickle.loads((run / ".metadata").read_bytes())
    written = pickle.dumps(metadata, protocol=2)  # names classes in text without a length
    renamed = re.sub(rb"cpathlib(\._local)?\nPosixPath", b"c" + module + b"\nPosixPath", written)
    assert b"c" + module in renamed
    (run / ".metadata").write_bytes(renamed)
    convert(Conversion(run, str(base)), tmp_path / "out")
    assert tensors_in(tmp_path / "out").keys() == TENSORS.keys()


def test_a_base_model_on_the_hub_is_described_without_its_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    run = save(tmp_path / "run", TENSORS)
    with Hub("some/base", files) as hub:
        hub.use(monkeypatch, tmp_path / "hub")
        convert(Conversion(run, "some/base"), tmp_path / "out")
    assert not list((tmp_path / "hub").rglob("*.safetensors"))
    assert tensors_in(tmp_path / "out").keys() == TENSORS.keys()
    assert (tmp_path / "out/config.json").read_bytes() == files["config.json"]


def pickled(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A folder in the format of before safetensors, in two files."""
    write_config(folder, CONFIG)
    names = list(tensors)
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        file = folder / f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in half}, file)
    return folder


def test_pickled_weights_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = pickled(tmp_path / "old", TENSORS), tmp_path / "out"
    assert main(["--pickle-path", str(folder), "--output", str(output), "--verify"]) == 0
    assert f"--model_dir {output}" in capsys.readouterr().out
    found = tensors_in(output)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    load_decoder(output)


def test_pickles_that_could_run_code_are_not_converted(base: Path, tmp_path: Path) -> None:
    folder, proof = pickled(tmp_path / "old", TENSORS), tmp_path / "proof"
    torch.save({"weight": Attack(proof)}, folder / "extra.bin")
    with pytest.raises(CheckpointError, match=r"extra\.bin cannot be read safely"):
        convert(Conversion(folder, None), tmp_path / "out")
    assert not proof.exists()
    torch.save({"weight": {"nested": torch.ones(1)}}, folder / "extra.bin")
    with pytest.raises(CheckpointError, match="does not hold tensors by their names alone"):
        convert(Conversion(folder, None), tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no weights in"):
        convert(Conversion(base, None), tmp_path / "out")
    with pytest.raises(CheckpointError, match="nowhere is not a folder that exists"):
        convert(Conversion(tmp_path / "nowhere", None), tmp_path / "out")


def test_the_server_converts_once_and_again_when_the_run_goes_on(
    base: Path, tmp_path: Path
) -> None:
    run = save(tmp_path / "run", TENSORS)
    config = ServerConfig(
        dcp_path=str(run), base_model=str(base), cache_dir=str(tmp_path / "cache")
    )
    first = find_checkpoint(config)
    assert first.parent == tmp_path / "cache/converted"
    index = first / "model.safetensors.index.json"
    written = index.stat().st_mtime_ns
    assert find_checkpoint(config) == first
    assert index.stat().st_mtime_ns == written
    shutil.rmtree(run)
    save(run, TENSORS | {NORM: TENSORS[NORM] * 2})
    second = find_checkpoint(config)
    assert second != first
    assert torch.equal(tensors_in(second)[NORM], TENSORS[NORM] * 2)


@pytest.mark.slow
def test_a_server_converts_at_its_first_start_and_not_at_its_second(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    make_checkpoint(base)
    run = save(tmp_path / "run", load_file(base / "model.safetensors"))
    options = ("--dcp_path", str(run), "--base_model", str(base), "--dtype", "float32")
    for converting in (True, False):
        with ServerProcess(*options, "--cache_dir", str(tmp_path / "cache")) as server:
            server.wait_until_ready()
            assert ("Converting to run-" in server.output) is converting


def test_a_cache_that_cannot_be_written_is_named(base: Path, tmp_path: Path) -> None:
    run = save(tmp_path / "run", TENSORS)
    (tmp_path / "file").write_text("", encoding="utf-8")
    config = ServerConfig(dcp_path=str(run), base_model=str(base), cache_dir=str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="--cache_dir"):
        find_checkpoint(config)


def test_the_command_says_where_it_is_and_what_is_wrong(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = save(tmp_path / "run", TENSORS), tmp_path / "out"
    options = ["--dcp_path", str(run), "--base_model", str(base), "--output", str(output)]
    assert main([*options, "--verify"]) == 0
    captured = capsys.readouterr()
    assert f"--model_dir {output}" in captured.out
    assert "Converting to out: 100%" in captured.err
    assert main([*options, "--dtype", "float16"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert main([*options, "--shard_size", "many"]) == 1
    assert "a size such as" in capsys.readouterr().err
    next(output.glob("*.safetensors")).write_bytes(b"")
    assert main([*options, "--verify"]) == 1
    assert "checksums" in capsys.readouterr().err


def test_the_script_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_dcp.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "hack/convert_dcp.py"), run_name="__main__")
    assert caught.value.code == 0
    assert "--dcp_path" in capsys.readouterr().out


PEAK = """
import sys
from pathlib import Path
from vdiff_kserve.convert import Conversion, convert

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

small, large = (Conversion(Path(run), base) for run, base in (sys.argv[1:3], sys.argv[3:5]))
convert(small, Path(sys.argv[5]))
before = memory("VmRSS")
convert(large, Path(sys.argv[6]))
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(base: Path, tmp_path: Path) -> None:
    """A 1 GB checkpoint whose largest tensor has 67 MB: a few of those, not the model."""
    config = CONFIG | {
        "d_model": 2048, "n_heads": 16, "n_kv_heads": 16, "n_layers": 5,
        "mlp_hidden_size": 5120, "embedding_size": 8192, "vocab_size": 8192,
    }  # fmt: skip
    tensors = tensors_of(config)
    assert sum(tensor.nbytes for tensor in tensors.values()) > 1e9
    largest = max(tensor.nbytes for tensor in tensors.values())
    large = write_single(tmp_path / "large", config, tensors)
    runs = [save(tmp_path / "run", TENSORS), save(tmp_path / "large-run", tensors)]
    del tensors
    pairs = (str(runs[0]), str(base), str(runs[1]), str(large))
    outputs = (str(tmp_path / "out"), str(tmp_path / "large-out"))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *pairs, *outputs],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert int(done.stdout) < 4 * largest
