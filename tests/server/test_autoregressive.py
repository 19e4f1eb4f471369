"""Causal checkpoints, served natively and by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from openai import BadRequestError, OpenAI
from transformers import PreTrainedModel

from tests.models.causal_folders import write_causal
from tests.server.checkpoint import make_tokenizer
from tests.server.process import ServerProcess
from vdiff_kserve import LLM, SamplingParams
from vdiff_kserve.config import parse_args
from vdiff_kserve.loading import load_model
from vdiff_kserve.models import CheckpointError

QUESTION = [{"role": "user", "content": "One word after the other?"}]


@contextmanager
def serving(name: str, folder: Path, *flags: str) -> Iterator[tuple[OpenAI, PreTrainedModel]]:
    reference = write_causal(name, folder)
    make_tokenizer().save_pretrained(folder)
    with (
        ServerProcess("--model_dir", str(folder), *flags).wait_until_ready() as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, reference


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OpenAI, PreTrainedModel]]:
    folder = tmp_path_factory.mktemp("gemma2")
    with serving("gemma2", folder, "--dtype", "float32") as pair:
        yield pair


def test_it_answers_as_generate_does(served: tuple[OpenAI, PreTrainedModel]) -> None:
    client, reference = served
    prompt = [5, 80, 33, 7, 120]
    answer = client.completions.create(
        model="", prompt=prompt, max_tokens=16, extra_body={"return_token_ids": True}
    )
    ids = torch.tensor([prompt])
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
    )
    assert answer.choices[0].token_ids == expected[0, len(prompt) :].tolist()
    cost = answer.vdiff
    assert cost["decoding"]["policy"] == "autoregressive"
    assert cost["nfe"] == answer.usage.completion_tokens
    assert cost["tokens_per_forward"] == 1.0


def test_a_stream_has_a_chunk_for_every_token(served: tuple[OpenAI, PreTrainedModel]) -> None:
    client, _ = served
    request = dict(model="", messages=QUESTION, max_tokens=20, extra_body={"ignore_eos": True})
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 10
    assert whole.usage.completion_tokens == 20


def test_stop_strings_log_probabilities_and_bans_work(
    served: tuple[OpenAI, PreTrainedModel],
) -> None:
    client, reference = served
    prompt = [5, 80, 33, 7, 120]
    request = dict(model="", prompt=prompt, max_tokens=12)
    plain = client.completions.create(**request, logprobs=3, extra_body={"return_token_ids": True})
    scores = plain.choices[0].logprobs
    with torch.inference_mode():
        logits = reference(torch.tensor([[*prompt, *plain.choices[0].token_ids[:-1]]])).logits[0]
    expected = logits[len(prompt) - 1 :].log_softmax(-1).amax(-1).tolist()
    assert scores.token_logprobs == pytest.approx(expected, abs=1e-3)
    stop = plain.choices[0].text[3:5]
    stopped = client.completions.create(**request, stop=stop)
    assert stopped.choices[0].text == plain.choices[0].text.split(stop)[0]
    first = plain.choices[0].token_ids[0]
    banned = client.completions.create(
        **request, logit_bias={str(first): -100}, extra_body={"return_token_ids": True}
    )
    assert first not in banned.choices[0].token_ids


def test_choices_share_the_prompt_and_differ(served: tuple[OpenAI, PreTrainedModel]) -> None:
    client, _ = served
    answer = client.chat.completions.create(
        model="", messages=QUESTION, max_tokens=12, n=3, temperature=1.0, seed=4
    )
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    again = client.chat.completions.create(
        model="", messages=QUESTION, max_tokens=12, n=3, temperature=1.0, seed=4
    )
    assert [choice.message.content for choice in again.choices] == texts
    assert again.usage.prompt_tokens_details.cached_tokens >= 16


@pytest.mark.parametrize(
    ("field", "value"), [("threshold", 0.9), ("steps", 8), ("cache", "dual"), ("profile", "fast")]
)
def test_fields_of_diffusion_are_refused_with_the_reason(
    served: tuple[OpenAI, PreTrainedModel], field: str, value: object
) -> None:
    client, _ = served
    with pytest.raises(BadRequestError, match="autoregressive") as refused:
        client.completions.create(model="", prompt="a", extra_body={field: value})
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("flags", "named"),
    [(("--mask_token_id", "5"), "--mask_token_id"), (("--threshold", "0.5"), "threshold")],
)
def test_options_of_diffusion_end_the_start(
    tmp_path: Path, flags: tuple[str, ...], named: str
) -> None:
    write_causal("qwen2", tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=named) as refused:
        load_model(parse_args(["--model_dir", str(tmp_path), *flags]))
    assert "autoregressive" in str(refused.value)


def test_a_layout_that_the_native_decoder_reads_is_served_without_flags(tmp_path: Path) -> None:
    write_causal("qwen2", tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with LLM(str(tmp_path)) as llm:
        (answer,) = llm.chat(QUESTION, params, use_tqdm=False)
    assert answer.outputs[0].nfe == len(answer.outputs[0].token_ids) == 4
