"""Forward passes on a CPU that stay in C++ through all layers.

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

import numpy as np
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
    from vdiff_kserve.models.decoder import Block, Decoder, DecoderConfig

GROUP = 6
"""Tokens that one thread takes at least, as far as there are so many: the library's `GROUP`."""

LARGEST_LOSS = 10_000_000
"""Products of a layer that each thread may do more than if all had tokens: about what it costs to
call the layer's parts through torch, where threads share a product by its outputs instead."""

LARGEST_LAYER = 1 << 23
"""Weights of a layer that threads read for few tokens at a time; larger ones are better read once
for all tokens, by layers that run one after the other."""

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64


def _many(name: str) -> tuple[tuple[str, type], tuple[str, type]]:
    """Fields of an array: where it is, and how many it has."""
    return (name, POINTER), (f"num_{name}", NUMBER)


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
        *((name, NUMBER) for name in ("tokens", "hidden_size", "turned")),
        *((name, NUMBER) for name in ("heads", "kv_heads", "head_size")),
        ("eps", ctypes.c_float),
        *_many("runs"),
        *_many("parts"),
        *_many("wanted"),
        *_many("wanted_parts"),
        *((name, POINTER) for name in ("cos", "sin", "last_norm")),
        *((name, POINTER) for name in ("hidden", "query", "key", "value", "attended")),
        *((name, POINTER) for name in ("stored_keys", "stored_values")),
        ("layer_size", NUMBER),
    )


class CpuLayers:
    """A decoder's layers as the library takes them; valid while its weights stay where they are.

    Attributes:
        structs: an array of `LayerStruct`.
    """

    def __init__(self, config: DecoderConfig, structs: list[LayerStruct]) -> None:
        self.structs = (LayerStruct * len(structs))(*structs)
        self._config = config
        self._angles = self._make_angles(0)

    def angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of at least so many positions, as `rotary_angles` gives them."""
        if positions > len(self._angles[0]):
            self._angles = self._make_angles(2 * positions)
        return self._angles

    def _make_angles(self, positions: int) -> tuple[Tensor, Tensor]:
        config = self._config
        size = config.rotary_dim or config.head_dim
        cos, sin = rotary_angles(torch.arange(positions), size, config.rope_theta)
        if config.rope_in_float32:
            return cos, sin
        return cos.bfloat16().float(), sin.bfloat16().float()


def cpu_layers(decoder: Decoder) -> CpuLayers | None:
    """A decoder's layers; None when one of them is not for the library."""
    is_for_it = (
        decoder.device.type == "cpu"
        and decoder.dtype == torch.bfloat16
        and decoder.vocab_shard is None  # ranks add up what they have after each half of a layer
    )
    structs = _layer_structs(decoder) if is_for_it else None
    return CpuLayers(decoder.config, structs) if structs is not None and works() else None


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


def can_run(decoder: Decoder, layers: CpuLayers, batch: ForwardBatch) -> bool:
    """Whether `CpuPass` takes this batch, and is faster than layer by layer."""
    products = len(batch.input_ids) * layers.structs[0].weights
    threads = torch.get_num_threads()
    busy = min(threads, -(-len(batch.input_ids) // GROUP))
    if products / busy - products / threads > LARGEST_LOSS or torch.is_grad_enabled():
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

    def __init__(self, decoder: Decoder, layers: CpuLayers, batch: ForwardBatch) -> None:
        config, store = decoder.config, batch.store
        hidden = decoder.embed_tokens(batch.input_ids)
        tokens, size = len(hidden), config.head_dim
        query, attended = (hidden.new_empty((tokens, config.num_heads, size)) for _ in range(2))
        key, value = (hidden.new_empty((tokens, config.num_kv_heads, size)) for _ in range(2))
        cos, sin = layers.angles(max(span.start + span.queries for span in batch.spans))
        wanted = batch.output_tokens
        self._wanted = tokens if wanted is None else len(wanted)
        runs = _runs(batch)
        parts, wanted_parts = (
            batch.seen_keys(config.attention_block, some).numbers
            for some in (False, wanted is not None)
        )
        tensors = cos, sin, decoder.norm.weight, hidden, query, key, value, attended
        stored = (None, None) if store is None else (store.keys, store.values)
        self._layers = layers
        self._hidden = hidden
        self._struct = PassStruct(
            tokens,
            config.hidden_size,
            cos.shape[-1],
            config.num_heads,
            config.num_kv_heads,
            size,
            config.rms_norm_eps,
            *(runs.data_ptr(), len(runs)),
            *(parts.data_ptr(), len(parts)),
            *(None if wanted is None else wanted.data_ptr(), self._wanted),
            *(wanted_parts.data_ptr(), len(wanted_parts)),
            *addresses(*tensors, *stored),
            0 if store is None else store.keys[0].numel(),
        )
        self._kept_alive = runs, parts, wanted, wanted_parts, *tensors, *stored
        self.layers_left = config.num_layers

    def advance(self, layers: int) -> None:
        """Run the next `layers` layers, or as many as are left."""
        structs, count = self._layers.structs, len(self._layers.structs)
        begin = count - self.layers_left
        end = min(begin + layers, count)
        if begin < end:
            this = ctypes.byref(self._struct)
            library().run_layers(structs, count, begin, end, this, torch.get_num_threads())
        self.layers_left = count - end

    @property
    def outputs(self) -> Tensor:
        """Hidden states after the final norm, [outputs, hidden_size], when no layer is left."""
        assert self.layers_left == 0, "the pass is not complete"
        return self._hidden[: self._wanted]


def _runs(batch: ForwardBatch) -> Tensor:
    """int64 [rows, 3], of each row's tokens: the first one's position, how many they are, and
    where the first one's key and value are kept, -1 for nowhere."""
    runs = []
    for span in batch.spans:
        offset = None if batch.store is None else span.cache_offset
        runs.append((span.start, span.queries, -1 if offset is None else offset + span.start))
    return torch.from_numpy(np.array(runs))


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
    structs = _layer_structs(decoder)
    if structs is None:
        return False
    batch = ForwardBatch.dense(torch.randint(0, 16, (3, 37), generator=generator))
    layers = CpuLayers(config, structs)
    passes = CpuPass(decoder, layers, batch), LayerwisePass(decoder, batch)
    for each in passes:
        each.advance(config.num_layers)
    fast, plain = (each.outputs for each in passes)
    return torch.allclose(fast, plain, atol=0.05, rtol=0.05)
