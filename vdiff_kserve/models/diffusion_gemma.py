"""DiffusionGemma, text only, as transformers implements it, over the engine's rows and cache.

An encoder reads the prompt and every finished canvas, causally, into the cache; a decoder with the
same weights denoises the next canvas, which sees all of itself and the cache.
"""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import DiffusionGemmaForBlockDiffusion

from vdiff_kserve.models.batch import ForwardBatch, KeyValueStore, RowSpan
from vdiff_kserve.models.causal_attention import NAME, AttentionCalls, attending
from vdiff_kserve.models.checkpoint_config import CheckpointConfig, CheckpointError
from vdiff_kserve.models.chunked_pass import CHUNKS, ChunkedPass
from vdiff_kserve.models.decoder import DecoderConfig
from vdiff_kserve.models.spec import ModelSpec, Renoising
from vdiff_kserve.models.transformers_folder import from_folder
from vdiff_kserve.models.transformers_model import TOLERANCE, cache_shape, relative_difference

END_OF_TURN = "<turn|>"
GENERATION = "generation_config.json"
MAX_TEMPERATURE = 100
MAX_ENTROPY = 100
ENTROPY_BOUND, FAST_ENTROPY_BOUND = 0.1, 0.5
NO_MASKS = {"full_attention": None, "sliding_attention": None}


class NoCache:
    """In the place of transformers' cache: a pass's keys and values are the engine's to keep."""

    is_compileable = False

    def __init__(self, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        nothing = torch.empty(0, dtype=dtype, device=device)
        self.layers = [SimpleNamespace(keys=nothing, values=nothing)] * layers

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The pass's own keys and values."""
        return key, value

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Nothing is kept."""
        return 0


class DiffusionGemma:
    """The encoder, the decoder and the head over packed rows.

    Calling it runs the encoder. All of it is transformers', but for attention, and for
    self-conditioning: that takes the embeddings that a step's logits come to, not the logits, which
    for a vocabulary of 262,144 are a hundred times as large.
    """

    def __init__(self, model: DiffusionGemmaForBlockDiffusion) -> None:
        model.set_attn_implementation({"text_config": NAME})
        text = model.config.text_config
        self._encoder = model.model.encoder.language_model
        self._decoder = model.model.decoder
        self._head = model.lm_head
        self._softcap = model.final_logit_softcapping
        self._soft: Tensor | None = None
        self._decoder.self_conditioning.register_forward_pre_hook(self._conditioned)
        parameters = signature(type(self._decoder).forward).parameters
        cache = "cache" if "cache" in parameters else "past_key_values"
        self._no_cache = {cache: NoCache(text.num_hidden_layers, self.dtype, self.device)}
        _, calls = self._encode(ForwardBatch.pack([torch.zeros(1).long()], device=self.device))
        num_layers, num_kv_heads, head_dim = cache_shape(calls)
        self.config = DecoderConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=num_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=text.rms_norm_eps,
            rope_theta=0.0,
            rope_in_float32=False,
            tie_embeddings=True,
            attention_block=1,
        )

    @property
    def device(self) -> torch.device:
        return self._head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._head.weight.dtype

    @property
    def vocab_shard(self) -> None:
        """The vocabulary is whole."""
        return None

    @property
    def stages(self) -> int:
        """A pass of the encoder may stop between chunks of its tokens."""
        return CHUNKS

    def __call__(self, batch: ForwardBatch) -> Tensor:
        """Read the rows of `batch` into the store; returns hidden states of the wanted tokens."""
        hidden, _ = self._encode(batch)
        wanted = batch.output_tokens
        return hidden if wanted is None else hidden[wanted]

    def begin(self, batch: ForwardBatch) -> ChunkedPass:
        """A pass of the encoder of which no chunk has run."""
        return ChunkedPass(self, batch)

    @torch.inference_mode()
    def denoise(self, batch: ForwardBatch, soft: Tensor | None) -> Tensor:
        """The decoder's hidden states of the rows' canvases, [tokens, hidden_size].

        Args:
            batch: the canvases are the spans' query tokens; the store has what lies before them.
            soft: what `soften` gave for the rows' steps before, [tokens, hidden_size]; zeros for a
                canvas's first. None is zeros for all.
        """
        self._soft = soft
        try:
            with attending(batch, reads_only=True):
                hidden = self._decoder(
                    decoder_input_ids=batch.input_ids[None],
                    decoder_attention_mask=NO_MASKS,
                    decoder_position_ids=batch.positions[None],
                    **self._no_cache,
                ).last_hidden_state[0]
        finally:
            self._soft = None
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[positions, hidden_size] -> float32 [positions, vocab]."""
        return self._softcap * torch.tanh(self._head(hidden).float() / self._softcap)

    own_logits = logits

    def soften(self, logits: Tensor) -> Tensor:
        """The embeddings that the next step is conditioned on: [positions, hidden_size].

        Args:
            logits: [positions, vocab], after temperature.
        """
        embedding = self._decoder.embed_tokens
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(self.dtype)
        return (weights @ embedding.weight) * embedding.embed_scale.to(self.dtype)

    def _encode(self, batch: ForwardBatch) -> tuple[Tensor, AttentionCalls]:
        with torch.inference_mode(), attending(batch) as calls:
            hidden = self._encoder(
                input_ids=batch.input_ids[None],
                attention_mask=NO_MASKS,
                position_ids=batch.positions[None],
                **self._no_cache,
            ).last_hidden_state[0]
        return hidden, calls

    def _conditioned(self, _: nn.Module, arguments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The decoder's call of self-conditioning, with what `denoise` was given."""
        embedded, zeros = arguments
        return embedded, zeros if self._soft is None else self._soft[None]


def load_diffusion_gemma(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    mesh: DeviceMesh | None = None,
    quantization: str | None = None,
) -> tuple[DiffusionGemma, ModelSpec]:
    """Read a DiffusionGemma checkpoint. Its vision tower is left out.

    Args:
        mesh, quantization: not for this model, and refused.

    Raises:
        CheckpointError: the folder is not sound, or transformers computes other logits than the
            model here.
    """
    folder = Path(folder)
    if mesh is not None or quantization is not None:
        option = "--tensor_parallel_size" if quantization is None else "--quantization"
        raise CheckpointError(f"{folder}: {option} is not for models that transformers runs")
    config = CheckpointConfig.read(folder)
    model = from_folder(DiffusionGemmaForBlockDiffusion, folder, device, dtype)
    model.model.encoder.vision_tower = None
    try:
        expected = _probe_stock(model)
        gemma = DiffusionGemma(model)
        difference = relative_difference(_probe(gemma), expected)
    except Exception as error:
        raise CheckpointError(f"{folder}: the model cannot be run: {error!r}") from error
    if not difference <= TOLERANCE[dtype]:
        raise CheckpointError(
            f"{folder}: this version of transformers computes other logits than are served "
            f"(they differ by {difference:.1e} of the largest)"
        )
    return gemma, _read_spec(config, model, gemma.config)


def _read_spec(
    config: CheckpointConfig, model: DiffusionGemmaForBlockDiffusion, sizes: DecoderConfig
) -> ModelSpec:
    """What `config.json` and `generation_config.json` say, and the published defaults."""
    text, asked = model.config.text_config, model.generation_config
    sampler = getattr(asked, "sampler_config", None)
    bound = ENTROPY_BOUND if sampler is None else sampler.entropy_bound
    ends = text.eos_token_id if getattr(asked, "eos_token_id", None) is None else asked.eos_token_id
    ends = tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
    if not ends or not all(isinstance(end, int) and 0 <= end < sizes.vocab_size for end in ends):
        raise config.error("eos_token_id", f"must be a token id or several, not {ends!r}")
    decoding = {"policy": "entropy_bound", "temperature": 1.0, "cache": "exact"}
    bounds = {"exact": bound, "quality": bound, "fast": max(bound, FAST_ENTROPY_BOUND)}
    return ModelSpec(
        family="diffusion_gemma",
        decoder=sizes,
        mask_token_id=None,
        eos_token_id=ends[0],
        eot_token_id=None,
        max_model_len=config.part("text_config").context("max_position_embeddings"),
        block_length=config.integer("canvas_length", default=model.config.canvas_length),
        profiles={name: decoding | {"entropy_bound": value} for name, value in bounds.items()},
        renoising=_renoising(CheckpointConfig(config.path.parent / GENERATION, vars(asked))),
        more_end_token_ids=ends[1:],
        eot_token=END_OF_TURN,
    )


def _renoising(asked: CheckpointConfig) -> Renoising:
    """What `generation_config.json` says, and the published defaults."""
    usual = Renoising()
    return Renoising(
        max_steps=asked.integer("max_denoising_steps", usual.max_steps),
        t_min=asked.number("t_min", usual.t_min, most=MAX_TEMPERATURE),
        t_max=asked.number("t_max", usual.t_max, most=MAX_TEMPERATURE),
        stability_threshold=asked.integer("stability_threshold", usual.stability_threshold),
        confidence_threshold=asked.number(
            "confidence_threshold", usual.confidence_threshold, most=MAX_ENTROPY
        ),
    )


def _probe_inputs(vocab_size: int) -> tuple[Tensor, Tensor]:
    """A prompt and a canvas, on the host."""
    generator = torch.Generator().manual_seed(0)
    prompt, canvas = (
        torch.randint(3, vocab_size // 2, (length,), generator=generator) for length in (11, 8)
    )
    return prompt, canvas


@torch.inference_mode()
def _probe_stock(model: DiffusionGemmaForBlockDiffusion) -> Tensor:
    """Logits of a short canvas, all by transformers: [tokens, vocab]."""
    inputs = _probe_inputs(model.config.text_config.vocab_size)
    prompt, canvas = (ids[None].to(model.device) for ids in inputs)
    return model(input_ids=prompt, decoder_input_ids=canvas).logits[0]


@torch.inference_mode()
def _probe(gemma: DiffusionGemma) -> Tensor:
    """The same over a store, next to another row."""
    config = gemma.config
    prompt, canvas = _probe_inputs(config.vocab_size)
    length, end = len(prompt), len(prompt) + len(canvas)
    shape = (config.num_layers, 2 * end, config.num_kv_heads, config.head_dim)
    keys, values = (torch.zeros(shape, dtype=gemma.dtype, device=gemma.device) for _ in range(2))
    store = KeyValueStore(keys, values)
    rows = [torch.cat((prompt.flip(0), canvas)), torch.cat((prompt, canvas))]
    read = [RowSpan(0, length, length, 0, length, offset) for offset in (0, end)]
    gemma(ForwardBatch.pack(rows, read, store, gemma.device))
    written = [RowSpan(length, end - length, end, length, end - length, o) for o in (0, end)]
    hidden = gemma.denoise(ForwardBatch.pack(rows, written, store, gemma.device), None)
    return gemma.logits(hidden[len(canvas) :])
