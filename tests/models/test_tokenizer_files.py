"""Tokenizers as repositories ship them: fast ones, vocabulary files, code; and chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerFast

from tests.server.checkpoint import make_tokenizer
from vdiff_kserve.models import CheckpointError, load_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
TEXTS = (
    "It's 12 o'clock, isn't IT?\n\n  Two  spaces\ttab\r\nend",
    'fn main() { println!("{}", 3.14159); }  \n\n\n    x',
    "naïve café — 漢字とかな, Ж, 🙂",
    "<|im_start|>user\nhi<|im_end|>\n<|mask|><|mask|>",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
CODE = """
from pathlib import Path
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
Path({proof!r}).touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    vocab_files_names = {{"own_file": "own.json"}}
    def __init__(self, own_file=None, **kwargs):
        super().__init__(tokenizer_object=Tokenizer.from_file(own_file), **kwargs)
"""


def write_vocabulary(folder: Path, **config: Any) -> PreTrainedTokenizerFast:
    """The files of a byte-level BPE as Dream's repository has them; returns the parts' source."""
    tokenizer = make_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    first = len(model["vocab"])
    added = {
        str(first + i): {"content": token, "special": True, "normalized": False, "lstrip": False,
                         "rstrip": False, "single_word": False}
        for i, token in enumerate(SPECIAL)
    }  # fmt: skip
    about = {
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:3]),
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "chat_template": TEMPLATE,
        "eos_token": SPECIAL[0],
        "mask_token": SPECIAL[3],
        "pad_token": SPECIAL[0],
        "tokenizer_class": "DreamTokenizer",
    } | config
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    (folder / "tokenization_dream.py").write_text("raise SystemExit(9)", encoding="utf-8")
    (folder / "modeling_dream.py").write_text("raise SystemExit(9)", encoding="utf-8")
    return tokenizer


def test_vocabulary_files_are_enough_and_no_code_is_run(tmp_path: Path) -> None:
    source = write_vocabulary(tmp_path)
    for trusted in (False, True):
        tokenizer = load_tokenizer(tmp_path, trust_code=trusted)
        first = source.get_vocab()["<|endoftext|>"]
        assert [tokenizer.get_vocab()[token] for token in SPECIAL] == [*range(first, first + 4)]
        assert tokenizer.mask_token_id == first + 3
        assert tokenizer.encode("the<|im_end|>")[-1] == first + 2
        assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_survives_a_tokenizer_of_vocabulary_files(tmp_path: Path, text: str) -> None:
    write_vocabulary(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def words(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    return [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]


def test_words_are_split_as_the_families_do(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    text = "It'S 42 a\n\n\nb  c."
    assert words(load_tokenizer(tmp_path), text) == [
        "It", "'S", " ", "4", "2", " a", "\n\n\n", "b", " ", " c", ".",
    ]  # fmt: skip


def test_a_fast_tokenizer_is_preferred(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert "<|start_header_id|>" in load_tokenizer(tmp_path).get_vocab()


def write_coded(folder: Path) -> Path:
    """A tokenizer that only its own code knows how to read; returns what the code leaves behind."""
    proof = folder / "proof"
    make_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").rename(folder / "own.json")
    (folder / "tokenization_own.py").write_text(CODE.format(proof=str(proof)), encoding="utf-8")
    about = {
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
        "tokenizer_class": "OwnTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return proof


def test_a_tokenizer_s_code_runs_only_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proof = write_coded(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    with pytest.raises(CheckpointError, match="--trust_remote_code"):
        load_tokenizer(tmp_path)
    assert not proof.exists()
    tokenizer = load_tokenizer(tmp_path, trust_code=True)
    assert proof.exists()
    assert tokenizer.encode("the") == make_tokenizer().encode("the")
    assert "Running the tokenizer's code" in caplog.text


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json, nor vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path, trust_code=True)
    write_vocabulary(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer_config.json"])
def test_damaged_files_are_one_clear_error(tmp_path: Path, file: str) -> None:
    write_vocabulary(tmp_path)
    (tmp_path / file).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def rendered(tokenizer: PreTrainedTokenizerFast) -> str:
    messages = [{"role": "user", "content": "hi"}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def test_a_template_comes_from_the_option_or_its_file_or_the_configuration(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    assert rendered(load_tokenizer(tmp_path)) == "<|im_start|>user\nhi<|im_end|>\n"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}", "utf-8")
    assert rendered(load_tokenizer(tmp_path)) == "file hi"
    named = tmp_path / "own.jinja"
    named.write_text("named {{ messages[0].content }}", encoding="utf-8")
    assert rendered(load_tokenizer(tmp_path, named)) == "named hi"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n{% for m in messages %}", "has an error in line 2"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_template_that_is_none_is_one_clear_error(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    write_vocabulary(tmp_path)
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path, file)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_templates_are_rendered_in_a_sandbox(tmp_path: Path, attack: str) -> None:
    write_vocabulary(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(attack, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(SecurityError):
        rendered(tokenizer)


def test_a_read_only_checkpoint_behind_a_link_is_fine(tmp_path: Path) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    write_vocabulary(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    folder.chmod(0o555)
    try:
        assert load_tokenizer(link).mask_token == "<|mask|>"
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    finally:
        folder.chmod(0o755)
