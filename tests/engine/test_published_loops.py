"""The engine writes what the published loops write where there is no recorded run of them:
LLaDA2.1's editing, SDAR's entropy bound, SDAR with experts, and temperatures above 0.

The engine runs all prompts at once, with the exact cache; the loops run them one by one without.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.device import TEST_DEVICE
from tests.engine.published_loops import (
    Forward,
    Sampling,
    llada2_generate,
    llada21_generate,
    sdar_generate,
)
from tests.engine.tiny import MASK, logits_of, running, tiny_decoder, tiny_spec
from tests.models.folders import write_config
from tests.models.test_expert_formats import save_dense_model, save_model
from vdiff_kserve.engine import GenerationRequest
from vdiff_kserve.models import Decoder, ModelSpec, load_decoder
from vdiff_kserve.models.moe import MoEConfig
from vdiff_kserve.sampler import DecodingParams
from vdiff_kserve.sampler.noise import gumbel, seed_of_draw

LENGTH = 26
SEED = 7
PROMPTS = [[5, 9, 12], list(range(1, 9)), list(range(20, 33)), [3] * 16, [30, 2, 30, 2, 30]]


@pytest.fixture(scope="module")
def llada2() -> Decoder:
    moe = MoEConfig(
        num_experts=8,
        experts_per_token=2,
        expert_size=16,
        scoring="sigmoid",
        renormalize=True,
        scaling=2.5,
        choice_bias=True,
        num_groups=4,
        groups_kept=2,
        shared_size=16,
    )
    return tiny_decoder(
        attention_block=8, qk_norm=True, rotary_dim=4, moe=moe, dense_layers=frozenset({0})
    )


def noise(number: int, position: int, vocab: int) -> Tensor:
    seed = torch.tensor([seed_of_draw(SEED, number)])
    return gumbel(seed, torch.tensor([position]), vocab)[0]


def generate(
    decoder: Decoder, spec: ModelSpec, end: int, *decodings: DecodingParams
) -> list[list[int]]:
    """What the engine writes, all prompts at once; one decoding for all of them or one for each."""
    each = decodings * (len(PROMPTS) if len(decodings) == 1 else 1)
    requests = [
        GenerationRequest(tuple(prompt), LENGTH, decoding, (end,))
        for prompt, decoding in zip(PROMPTS, each, strict=True)
    ]
    with running(decoder, spec=spec) as engine:
        return [list(result.token_ids) for result in engine.generate(requests)]


def check(
    run: Callable[[int], list[list[int]]], loop: Callable[[list[int], int], list[int]]
) -> None:
    """Compare; a token that the first answer has in its middle takes the part of the end token."""
    with torch.inference_mode():
        end = loop(PROMPTS[0], -1)[LENGTH // 2]
        expected = [loop(prompt, end) for prompt in PROMPTS]
    assert len(expected[0]) <= LENGTH // 2
    assert run(end) == expected


SAMPLINGS = [
    {},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.9},
]


@pytest.mark.parametrize("sampled", SAMPLINGS, ids=str)
@pytest.mark.parametrize(("threshold", "steps"), [(0.5, 8), (0.8, 4), (0.3, 3)])
def test_llada2_writes_what_its_loop_writes(
    llada2: Decoder, sampled: dict[str, float], threshold: float, steps: int
) -> None:
    sampling = Sampling(MASK, **sampled, noise=noise)
    masks = [-(-(len(prompt) + LENGTH) // 8) * 8 - len(prompt) for prompt in PROMPTS]
    decodings = [
        DecodingParams(
            policy="dynamic",
            threshold=threshold,
            steps=round(steps * own / 8),
            block_length=8,
            cache="exact",
            seed=SEED,
            filtered_confidence=True,
            **sampled,
        )
        for own in masks
    ]
    check(
        lambda end: generate(llada2, tiny_spec(llada2), end, *decodings),
        lambda prompt, end: llada2_generate(
            partial(logits_of, llada2), prompt, LENGTH, 8, steps, threshold, sampling, end
        ),
    )


@pytest.mark.parametrize("sampled", SAMPLINGS, ids=str)
@pytest.mark.parametrize(
    ("threshold", "edit_threshold", "max_post_edits"),
    [(0.7, 0.5, 16), (0.7, 0.5, 0), (0.5, 0.0, 6), (0.5, 0.0, 1)],
)
def test_llada2_1_edits_as_its_loop_does(
    llada2: Decoder,
    sampled: dict[str, float],
    threshold: float,
    edit_threshold: float,
    max_post_edits: int,
) -> None:
    decoding = DecodingParams(
        policy="edit",
        threshold=threshold,
        edit_threshold=edit_threshold,
        max_post_edits=max_post_edits,
        block_length=8,
        cache="exact",
        seed=SEED,
        filtered_confidence=True,
        **sampled,
    )
    sampling = Sampling(MASK, **sampled, noise=noise)
    edits = 0

    def loop(prompt: list[int], end: int) -> list[int]:
        nonlocal edits
        answer, own = llada21_generate(
            partial(logits_of, llada2),
            prompt,
            LENGTH,
            8,
            threshold,
            edit_threshold,
            max_post_edits,
            sampling,
            end,
        )
        edits += own
        return answer

    check(lambda end: generate(llada2, tiny_spec(llada2), end, decoding), loop)
    assert edits > 0


@pytest.fixture(scope="module", params=["sdar", "sdar_moe"])
def sdar(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Decoder, ModelSpec, Forward]:
    """A checkpoint in SDAR's format, and transformers' own Qwen3 with a block-causal mask."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sdar":
        model, fields = save_dense_model(folder)
        fields |= {"architectures": ["SDARForCausalLM"]}
    else:
        model, fields = save_model(folder, norm_topk_prob=True)
        fields |= {"architectures": ["SDARMoeForCausalLM"]}
    write_config(folder, fields | {"block_size": 8})
    decoder, spec = load_decoder(folder, TEST_DEVICE)

    def forward(ids: Tensor) -> Tensor:
        blocks = torch.arange(len(ids)) // 8
        unseen = (blocks[:, None] < blocks).float() * torch.finfo(torch.float32).min
        return model(ids[None], attention_mask=unseen[None, None]).logits[0]

    return decoder, spec, forward


@pytest.mark.parametrize("sampled", SAMPLINGS, ids=str)
@pytest.mark.parametrize(
    ("strategy", "bound"), [("dynamic", 0.3), ("dynamic", 0.9), ("entropy", 0.5), ("entropy", 4.0)]
)
def test_sdar_writes_what_its_loop_writes(
    sdar: tuple[Decoder, ModelSpec, Forward],
    sampled: dict[str, float],
    strategy: str,
    bound: float,
) -> None:
    decoder, spec, forward = sdar
    decoding = DecodingParams(
        policy="dynamic" if strategy == "dynamic" else "entropy_sum",
        threshold=bound,
        entropy_bound=bound,
        block_length=8,
        cache="exact",
        seed=SEED,
        **sampled,
    )
    sampling = Sampling(spec.mask_token_id, **sampled, noise=noise)
    check(
        lambda end: generate(decoder, spec, end, decoding),
        lambda prompt, end: sdar_generate(
            forward, prompt, LENGTH, 8, 8, strategy, bound, sampling, end
        ),
    )
