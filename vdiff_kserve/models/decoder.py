"""The decoder behind every masked-diffusion family: one model, described by data.

Llama-style pre-norm blocks without a causal mask. What differs between families (sizes, rotary
precision, tied embeddings ...) is in `DecoderConfig`; how a published checkpoint names its fields
and tensors is in the family's own file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from vdiff_kserve.models import cpu_kernels, cpu_pass, fp8, fused
from vdiff_kserve.models.attention import attend_packed, can_attend, has_kernel
from vdiff_kserve.models.batch import ForwardBatch
from vdiff_kserve.models.cpu_pass import CpuLayers, CpuPass
from vdiff_kserve.models.fp8 import Activations
from vdiff_kserve.models.joined_linear import JoinedLinear
from vdiff_kserve.models.layers import GatedMLP, RMSNorm, attend, rotary_angles, rotate
from vdiff_kserve.models.moe import MoEConfig, SparseMLP

if TYPE_CHECKING:
    from vdiff_kserve.models.sharding import VocabShard

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that shapes a decoder; sizes in elements.

    Attributes:
        rope_in_float32: whether queries and keys are rotated in float32, whatever the dtype.
        attention_block: None sees the whole row; n is block-causal attention, in which a token sees
            all tokens of its own and earlier blocks of n; 1 is a causal language model.
        rotary_dim: how many of a head's dimensions, from the first, are rotated; None is all.
        moe: the experts in the place of a layer's MLP; None is a dense model.
        dense_layers: layers of a model with experts that have an MLP of `intermediate_size`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_in_float32: bool
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    attention_block: int | None = None
    rotary_dim: int | None = None
    moe: MoEConfig | None = None
    dense_layers: frozenset[int] = frozenset()

    @property
    def has_dense_layers(self) -> bool:
        """Whether any layer has a plain MLP."""
        return self.moe is None or any(layer < self.num_layers for layer in self.dense_layers)

    @property
    def activations_per_token(self) -> int:
        """Numbers of the model's type that a pass keeps at once for each of its tokens, at most, as
        it runs on a GPU.

        The residual stream takes five of a token's hidden size: as the layer found it, what is
        added to it, their sum, its norm, and what the layer's part makes of that.
        """
        heads, hidden = self.num_heads + self.num_kv_heads, self.hidden_size
        parts = [3 * heads * self.head_dim]  # joined, rotated, attended
        if self.has_dense_layers:
            parts.append(3 * self.intermediate_size)  # gate, up, their product
        if self.moe is not None:
            # Its input, output, and that in the tokens' order, once more in float32.
            of_expert = 5 * hidden + 3 * self.moe.expert_size
            parts.append(self.moe.experts_per_token * of_expert + 3 * self.moe.shared_size)
        return 5 * hidden + max(parts)


class Attention(JoinedLinear):
    """Multi-head (or grouped-query) attention over rows, with rotary positions."""

    joinable = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_block = config.attention_block
        self.head_dim = config.head_dim
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, hidden: Activations, angles: Angles, batch: ForwardBatch, outputs: Tensor | None
    ) -> Tensor:
        """`outputs` (indices of tokens) limits the queries; keys and values use every token."""
        if outputs is None and self.is_joined and fp8.takes_kernels(hidden):
            query, key, value = self._joined_heads(hidden, angles, batch)
        else:
            query, key, value = self._heads(hidden, angles, batch, outputs)
        cached = self._cached(batch)
        block = self.attention_block
        if has_kernel(query.device, query.dtype, self.head_dim):
            causal = block == 1  # which the kernel knows by itself
            rows = batch.packed(None if causal else block, outputs is not None)
            if rows is not None and can_attend(query, key, value, rows, cached):
                return self.o_proj(attend_packed(query, key, value, rows, cached, causal))
        if query.device.type == "cpu":
            seen = batch.seen_keys(block, outputs is not None)
            if cpu_kernels.can_attend(query, key, value, seen):
                return self.o_proj(cpu_kernels.attend(query, key, value, cached, seen))
        groups = batch.groups if outputs is None else batch.output_groups
        return self.o_proj(attend(query, key, value, groups, cached, block))

    def _heads(
        self, hidden: Activations, angles: Angles, batch: ForwardBatch, outputs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `outputs`, and keys and values, which are kept: [tokens, heads, head_dim]."""
        cos, sin = angles
        key = self.k_norm(self.k_proj(hidden).unflatten(-1, (-1, self.head_dim)))
        key = rotate(key, cos, sin)
        value = self.v_proj(hidden).unflatten(-1, (-1, self.head_dim))
        self._keep(key, value, batch)
        if outputs is not None:
            hidden, cos, sin = hidden[outputs], cos[outputs], sin[outputs]
        query = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, self.head_dim)))
        return rotate(query, cos, sin), key, value

    def _joined_heads(
        self, hidden: Activations, angles: Angles, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of all tokens by one product and one kernel."""
        joined = self.multiply_joined(hidden).unflatten(-1, (-1, self.head_dim))
        kv_heads = len(self.k_proj.weight) // self.head_dim
        norms = kept = None
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            norms = fused.HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        cached, places = self._cached(batch), batch.cache_places
        if cached is not None and places is not None and batch.cached_tokens is None:
            kept = fused.Kept(*cached, places)
        query, key, value = fused.heads(joined, kv_heads, *angles, norms, kept)
        if kept is None:
            self._keep(key, value, batch)
        return query, key, value

    def _cached(self, batch: ForwardBatch) -> tuple[Tensor, Tensor] | None:
        """This layer's part of the cache; None when the pass has none."""
        if batch.store is None or batch.cache_places is None:
            return None
        return batch.store.keys[self.layer], batch.store.values[self.layer]

    def _keep(self, key: Tensor, value: Tensor, batch: ForwardBatch) -> None:
        """Write the new keys and values to the cache."""
        cached, places = self._cached(batch), batch.cache_places
        if cached is None or places is None:
            return
        tokens = batch.cached_tokens
        for stored, fresh in zip(cached, (key, value), strict=True):
            if cpu_kernels.usable(fresh):
                cpu_kernels.keep(fresh, tokens, places, stored)
            else:
                stored.index_copy_(0, places, fresh if tokens is None else fresh[tokens])


class Block(nn.Module):
    """Pre-norm attention and MLP (or experts), each added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: GatedMLP | SparseMLP
        if config.moe is None or layer in config.dense_layers:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = SparseMLP(config.hidden_size, config.moe)

    def forward(
        self,
        hidden: Tensor,
        added: Tensor | None,
        angles: Angles,
        batch: ForwardBatch,
        outputs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            hidden: [tokens, hidden_size], the residual stream without `added`, what the layer
                before adds to it; None is nothing.

        Returns:
            the two as the next layer takes them.
        """
        hidden, normed = _norm_for(self.attention, self.attention_norm, hidden, added)
        attended = self.attention(normed, angles, batch, outputs)
        if outputs is not None:
            hidden = hidden[outputs]
        hidden, normed = _norm_for(self.mlp, self.mlp_norm, hidden, attended)
        return hidden, self.mlp(normed)


def _norm_for(
    layer: nn.Module, norm: RMSNorm, hidden: Tensor, added: Tensor | None
) -> tuple[Tensor, Activations]:
    """`hidden`, with `added` unless it is None, and its norm as `layer` takes it."""
    if isinstance(layer, JoinedLinear) and layer.in_fp8:
        return norm.rounded(hidden, added)
    return (hidden, norm(hidden)) if added is None else norm.of_sum(hidden, added)


class Decoder(nn.Module):
    """Token embedding, blocks, final norm and language-model head.

    `forward` returns hidden states, not logits: a vocabulary of 126,464 makes logits for a whole
    canvas cost hundreds of megabytes, so `logits` is called for the positions that need it only.

    Attributes:
        vocab_shard: the part of the vocabulary that this rank's head is for; None when the decoder
            is whole.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_shard: VocabShard | None = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def stages(self) -> int:
        """A pass may stop after each layer."""
        return self.config.num_layers

    def join_layers(self) -> None:
        """Let layers that take the same input be computed as one, as a loaded decoder's are on a
        GPU."""
        for module in self.modules():
            if isinstance(module, JoinedLinear):
                module.join(self.device, self.dtype)

    def begin(self, batch: ForwardBatch) -> LayerwisePass | CpuPass:
        """A pass of which no layer has run."""
        layers = self._cpu_layers
        if layers is not None and cpu_pass.can_run(self, layers, batch):
            return CpuPass(self, layers, batch)
        return LayerwisePass(self, batch)

    @cached_property
    def _cpu_layers(self) -> CpuLayers | None:
        """The layers as a `CpuPass` takes them; None when they are not for it."""
        return cpu_pass.cpu_layers(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.__dict__.pop("_cpu_layers", None)  # they know where the weights were
        return super()._apply(fn, recurse)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run the rows of `batch`; the last block computes only the tokens asked for.

        Returns:
            hidden states after the final norm, [outputs, hidden_size], rows end to end.
        """
        whole = self.begin(batch)
        whole.advance(self.config.num_layers)
        return whole.outputs

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the given hidden states: [positions, hidden_size] -> [positions, vocab]."""
        logits = self.own_logits(hidden)
        return logits if self.vocab_shard is None else self.vocab_shard.whole(logits)

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the tokens that this rank's head is for."""
        return self.lm_head(hidden)


class LayerwisePass:
    """A forward pass that may stop between layers, so that a long one need not run in one piece.

    Attributes:
        layers_left: layers still to run.
    """

    def __init__(self, decoder: Decoder, batch: ForwardBatch) -> None:
        config = decoder.config
        self._decoder = decoder
        self._batch = batch
        self._hidden = decoder.embed_tokens(batch.input_ids)
        rotary_dim = config.rotary_dim or config.head_dim
        cos, sin = rotary_angles(batch.positions, rotary_dim, config.rope_theta)
        if not config.rope_in_float32:
            cos, sin = cos.to(self._hidden.dtype), sin.to(self._hidden.dtype)
        self._angles = cos, sin
        self._added: Tensor | None = None
        self.layers_left = config.num_layers

    def advance(self, layers: int) -> None:
        """Run the next `layers` layers, or as many as are left."""
        first = len(self._decoder.layers) - self.layers_left
        for layer in self._decoder.layers[first : first + layers]:
            is_last = self.layers_left == 1
            outputs = self._batch.output_tokens if is_last else None
            self._hidden, self._added = layer(
                self._hidden, self._added, self._angles, self._batch, outputs
            )
            self.layers_left -= 1

    @property
    def outputs(self) -> Tensor:
        """Hidden states after the final norm, [outputs, hidden_size], when no layer is left."""
        assert self.layers_left == 0, "the pass is not complete"
        assert self._added is not None
        return self._decoder.norm.of_sum(self._hidden, self._added)[1]
