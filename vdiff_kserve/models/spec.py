"""What a server needs to know about a model beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vdiff_kserve.models.decoder import DecoderConfig

CAUSAL_PREFIX_BLOCK = 16


@dataclass(frozen=True)
class Renoising:
    """How a model without a mask token is denoised: from random tokens, in canvases that are
    written whole (DiffusionGemma).

    Attributes:
        max_steps: most denoising steps of a canvas.
        t_min, t_max: temperature of the last and (nearly) the first of them.
        stability_threshold: a canvas is done when its likeliest tokens were the same in so many
            steps before, and
        confidence_threshold: the mean entropy of its positions, in nats, is below this.
    """

    max_steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005


@dataclass(frozen=True)
class ModelSpec:
    """A family's facts, read from its `config.json`.

    Attributes:
        family: short name of the family, for logs and the model list.
        mask_token_id: the token that stands for "not yet written"; never sampled. None for a model
            that has none.
        eos_token_id: ends a text and fills the canvas after it.
        eot_token_id: ends a chat turn; None when the vocabulary has none.
        max_model_len: most tokens of a canvas (prompt and answer).
        block_length: default length of the blocks that are decoded left to right.
        profiles: named decodings, each as decoding parameters by name: `exact` decodes as the
            model's authors do, `quality` is the server's default, `fast` gives up some quality.
        sub_blocks: whether the blocks of a block-causal model begin with a token that is predicted
            from the block before, and the rest of them is decoded in smaller blocks.
        autoregressive: whether it is a causal language model, served token by token.
        cacheable: whether an autoregressive model's keys and values can be kept between its passes.
        renoising: how a model without masks is denoised; None for all others.
        more_end_token_ids: further tokens that end an answer.
        shifted_logits: whether the logits at position i predict token i + 1, not token i.
        eot_token: how the tokenizer writes the token that ends a chat turn.
        filler_tokens: the same of tokens that the model fills the canvas with behind an answer.
    """

    family: str
    decoder: DecoderConfig
    mask_token_id: int | None
    eos_token_id: int
    eot_token_id: int | None
    max_model_len: int
    block_length: int
    profiles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shifted_logits: bool = False
    sub_blocks: bool = False
    autoregressive: bool = False
    cacheable: bool = True
    renoising: Renoising | None = None
    more_end_token_ids: tuple[int, ...] = ()
    eot_token: str = ""
    filler_tokens: tuple[str, ...] = ()

    @property
    def block_causal(self) -> bool:
        """Whether finished blocks never depend on later ones, so that caching them is exact."""
        return self.decoder.attention_block is not None

    @property
    def prefix_block_length(self) -> int:
        """Prompts that begin alike are recognized by whole blocks of this length."""
        causal = self.autoregressive or self.renoising is not None
        return CAUSAL_PREFIX_BLOCK if causal else self.block_length

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ids = (self.eos_token_id, self.eot_token_id, *self.more_end_token_ids)
        return tuple(dict.fromkeys(i for i in ids if i is not None))
