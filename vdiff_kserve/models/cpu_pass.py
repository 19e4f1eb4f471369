"""Forward passes on a CPU that stay in C++ between one layer's attention and the next.

A layer of a small model is done sooner than torch has called its parts, and what each part gives
goes through memory. Here, a thread takes a few tokens from attention through the rest of the layer
and to the next layer's queries, keys and values; `layers.cpp` in `cpu_library` has the steps. They
round where the layers' own modules do, so that a pass gives the same numbers either way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from vdiff_kserve import cpu_library
from vdiff_kserve.cpu_library import addresses, library
from vdiff_kserve.models import cpu_kernels
from vdiff_kserve.models.batch import ForwardBatch
from vdiff_kserve.models.layers import GatedMLP, RMSNorm, rotary_angles
from vdiff_kserve.models.packed_linear import pack_linear_layers
from vdiff_kserve.models.panel_linear import LinearStruct, PanelLinear

if TYPE_CHECKING:
    from vdiff_kserve.models.decoder import Block, Decoder

LEAST_TOKENS = 16
"""Of a pass for each thread: all of them read all weights, which is too much for fewer."""

LARGEST_LAYER = 1 << 23
"""Weights of a layer that threads read for few tokens at a time; larger ones are better read once
for all tokens, by layers that run one after the other."""

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64


class LayerStruct(ctypes.Structure):
    """`Layer` of the library."""

    _fields_ = (
        ("norm", POINTER),
        *((name, LinearStruct) for name in ("query", "key", "value")),
        ("query_norm", POINTER),
        ("key_norm", POINTER),
        ("output", LinearStruct),
        ("mlp_norm", POINTER),
        *((name, LinearStruct) for name in ("gate", "up", "down")),
    )

    @property
    def weights(self) -> int:
        """How many the matrices have together."""
        parts = (getattr(self, name) for name, *_ in self._fields_)
        matrices = (part for part in parts if isinstance(part, LinearStruct))
        return sum(matrix.inputs * matrix.outputs for matrix in matrices)


class PassStruct(ctypes.Structure):
    """`Pass` of the library."""

    _fields_ = (
        *((name, NUMBER) for name in ("tokens", "hidden_size", "head_size", "turned")),
        ("eps", ctypes.c_float),
        *((name, POINTER) for name in ("hidden", "attended", "cos", "sin")),
        *((name, POINTER) for name in ("query", "key", "value")),
        *((name, POINTER) for name in ("stored_keys", "stored_values", "places")),
        *((name, POINTER) for name in ("last_norm", "out")),
    )


def layer_structs(decoder: Decoder) -> list[LayerStruct] | None:
    """A decoder's layers as the library takes them; None when one of them is not for it.

    They are valid as long as the decoder's weights stay where they are.
    """
    is_for_it = (
        decoder.device.type == "cpu"
        and decoder.dtype == torch.bfloat16
        and decoder.vocab_shard is None  # ranks add up what they have after each half of a layer
    )
    structs = _layer_structs(decoder) if is_for_it else None
    return structs if structs is not None and works() else None


def _layer_structs(decoder: Decoder) -> list[LayerStruct] | None:
    structs = [_layer_struct(block) for block in cast("Iterable[Block]", decoder.layers)]
    found = [struct for struct in structs if struct is not None]
    is_small = all(struct.weights <= LARGEST_LAYER for struct in found)
    return found if is_small and len(found) == len(structs) else None


def _layer_struct(block: Block) -> LayerStruct | None:
    """None unless it is a dense layer whose products are the library's."""
    attention, mlp = block.attention, block.mlp
    if not isinstance(mlp, GatedMLP):
        return None
    linear = {
        "query": attention.q_proj,
        "key": attention.k_proj,
        "value": attention.v_proj,
        "output": attention.o_proj,
        "gate": mlp.gate_proj,
        "up": mlp.up_proj,
        "down": mlp.down_proj,
    }
    structs = {
        name: layer.struct for name, layer in linear.items() if isinstance(layer, PanelLinear)
    }
    if len(structs) < len(linear):
        return None
    norms = {
        "norm": block.attention_norm,
        "query_norm": attention.q_norm,
        "key_norm": attention.k_norm,
        "mlp_norm": block.mlp_norm,
    }
    weights = {name: norm.weight for name, norm in norms.items() if isinstance(norm, RMSNorm)}
    return LayerStruct(**structs, **{name: own.data_ptr() for name, own in weights.items()})


def can_run(decoder: Decoder, batch: ForwardBatch) -> bool:
    """Whether `CpuPass` takes this batch, and is faster than layer by layer."""
    if len(batch.input_ids) < LEAST_TOKENS * torch.get_num_threads() or torch.is_grad_enabled():
        return False
    config = decoder.config
    seen = batch.seen_keys(config.attention_block, False)
    group = config.num_heads // config.num_kv_heads
    return cpu_kernels.fills_lanes(seen, group, config.head_dim)


class CpuPass:
    """A pass as `LayerwisePass`, by the library.

    Attributes:
        layers_left: layers still to run.
    """

    def __init__(self, decoder: Decoder, layers: list[LayerStruct], batch: ForwardBatch) -> None:
        config = decoder.config
        self._config = config
        self._layers = layers
        self._last_norm = decoder.norm.weight
        self._batch = batch
        self._hidden = decoder.embed_tokens(batch.input_ids)
        cos, sin = rotary_angles(
            batch.positions, config.rotary_dim or config.head_dim, config.rope_theta
        )
        if not config.rope_in_float32:
            cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
        self._angles = cos, sin
        self._places = _places(batch)
        tokens, size = len(batch.input_ids), config.head_dim
        self._query = self._hidden.new_empty((tokens, config.num_heads, size))
        self._key, self._value = (
            self._hidden.new_empty((tokens, config.num_kv_heads, size)) for _ in range(2)
        )
        self._out = torch.empty_like(self._hidden)
        self.layers_left = config.num_layers

    def advance(self, layers: int) -> None:
        """Run the next `layers` layers, or as many as are left."""
        last = self._config.num_layers - 1
        for _ in range(min(layers, self.layers_left)):
            layer = self._config.num_layers - self.layers_left
            if layer == 0:
                self._step(None, 0)
            outputs = self._batch.output_tokens if layer == last else None
            query, hidden = self._query, self._hidden
            if outputs is not None:
                query, hidden = query[outputs], hidden[outputs]
            attended = self._attend(layer, query, outputs is not None)
            self._hidden = hidden  # not before: a layer that fails may be tried again
            self._step(attended, layer + 1)
            self.layers_left -= 1

    def _attend(self, layer: int, query: Tensor, wanted: bool) -> Tensor:
        seen = self._batch.seen_keys(self._config.attention_block, wanted)
        return cpu_kernels.attend(query, self._key, self._value, self._stored(layer), seen)

    def _stored(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """A layer's part of the cache; None when the pass has none."""
        if self._places is None or self._batch.store is None:
            return None
        return self._batch.store.keys[layer], self._batch.store.values[layer]

    def _step(self, attended: Tensor | None, layer: int) -> None:
        """Go on from what the attention before `layer` gave to the queries of `layer`, or to the
        end."""
        is_end = layer == len(self._layers)
        stored = None if is_end else self._stored(layer)
        config = self._config
        state = PassStruct(
            len(self._hidden),
            config.hidden_size,
            config.head_dim,
            self._angles[0].shape[-1],
            config.rms_norm_eps,
            *addresses(self._hidden, attended, *self._angles),
            *addresses(self._query, self._key, self._value),
            *addresses(*((None, None) if stored is None else stored), self._places),
            *addresses(self._last_norm if is_end else None, self._out),
        )
        ended = None if attended is None else ctypes.byref(self._layers[layer - 1])
        begun = None if is_end else ctypes.byref(self._layers[layer])
        library().between_attentions(ended, begun, ctypes.byref(state), torch.get_num_threads())

    @property
    def outputs(self) -> Tensor:
        """Hidden states after the final norm, [outputs, hidden_size], when no layer is left."""
        assert self.layers_left == 0, "the pass is not complete"
        return self._out[: len(self._hidden)]


def _places(batch: ForwardBatch) -> Tensor | None:
    """int64 [tokens], where each token's keys and values are kept, -1 for nowhere; None when none
    is."""
    if batch.store is None or batch.cache_places is None or batch.cached_tokens is None:
        return batch.cache_places
    places = torch.full_like(batch.input_ids, -1)
    places[batch.cached_tokens] = batch.cache_places
    return places


@cache
def works() -> bool:
    """Whether the library can be had and computes what the layers do."""
    return cpu_kernels.works() and cpu_library.kernels_work(
        agrees, "Passes go layer by layer through torch"
    )


@torch.inference_mode()
@torch.random.fork_rng(devices=[])
def agrees() -> bool:
    """Whether a pass of a few random layers is the same by the library and by the layers."""
    from vdiff_kserve.models.decoder import Decoder, DecoderConfig, LayerwisePass

    config = DecoderConfig(
        vocab_size=16,
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_in_float32=True,
        tie_embeddings=True,
        qkv_bias=True,
        qk_norm=True,
    )
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(config).bfloat16()
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    pack_linear_layers(decoder)
    layers = _layer_structs(decoder)
    if layers is None:
        return False
    batch = ForwardBatch.dense(torch.randint(0, 16, (3, 37), generator=generator))
    passes = CpuPass(decoder, layers, batch), LayerwisePass(decoder, batch)
    for each in passes:
        each.advance(config.num_layers)
    fast, plain = (each.outputs for each in passes)
    return torch.allclose(fast, plain, atol=0.05, rtol=0.05)
