"""One decoder over several devices: which part of each tensor a rank holds, and where ranks meet.

Tensor parallelism as in Megatron-LM (arXiv 1909.08053): the projections that widen (queries, keys,
values, gate, up) are split by output, those that narrow again (attention output, down) by input, so
that a layer needs one sum over the ranks after its attention and one after its MLP. The experts of
a layer are spread: each rank holds as many whole ones and sends all tokens through those of their
experts that it holds; the sum after the MLP adds the others'. Where the ranks cannot share the
experts equally, each expert is split as an MLP is; one that every token passes through always is.
Embedding and head are split by vocabulary. The plan is applied by
`torch.distributed.tensor.parallel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from vdiff_kserve.models.checkpoint_config import CheckpointError
from vdiff_kserve.models.decoder import Decoder, DecoderConfig
from vdiff_kserve.models.layers import GatedMLP
from vdiff_kserve.models.moe import Experts


@dataclass(frozen=True)
class Slice:
    """A rank's part of a tensor: `length` entries of dimension `dim` from `start` on."""

    dim: int
    start: int
    length: int

    @property
    def index(self) -> tuple[slice, ...]:
        """What takes that part out of a whole tensor."""
        return (slice(None),) * self.dim + (slice(self.start, self.start + self.length),)


@dataclass(frozen=True)
class WholeExperts:
    """A rank's part of a layer's stacked experts: `count` from `first` on."""

    first: int
    count: int


Part = Slice | WholeExperts


@dataclass(frozen=True)
class VocabShard:
    """The part of the vocabulary whose logits a rank computes.

    Attributes:
        start: its first token.
        group: the ranks, in the order of their parts.
    """

    start: int
    group: ProcessGroup

    def gather(self, local: Tensor) -> Tensor:
        """What each rank has, on every rank: [...] -> [ranks, ...]."""
        parts = local.new_empty((self.group.size(), *local.shape))
        dist.all_gather(list(parts), local.contiguous(), group=self.group)
        return parts

    def whole(self, logits: Tensor) -> Tensor:
        """Logits of all tokens: [positions, tokens of this rank] -> [positions, vocab]."""
        return self.gather(logits).transpose(0, 1).flatten(1)


def shard(decoder: Decoder, mesh: DeviceMesh) -> Mapping[str, Part]:
    """Leave `decoder` with this rank's part of the model; its config then describes that part.

    Args:
        decoder: whole, on the meta device: nothing is read for what other ranks hold.
        mesh: the ranks, one dimension.

    Returns:
        the part of each split parameter that has to be loaded, by name.

    Raises:
        CheckpointError: a size of the model is not a multiple of the number of ranks.
    """
    _check_divisible(decoder.config, mesh.size())
    parts: Parts = {}
    by_output, by_input = _Split(0, parts), _Split(1, parts)
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": _SplitEmbedding(0, parts),
        "lm_head": by_output,
        "layers.*.attention": _Sum(),
        "layers.*.attention.[qkv]_proj": by_output,
        "layers.*.attention.o_proj": by_input,
        "layers.*.mlp": _Sum(),
    }
    config, size = decoder.config, mesh.size()
    for path, module in decoder.named_modules():
        if isinstance(module, GatedMLP):
            plan[f"{path}.gate_proj"] = plan[f"{path}.up_proj"] = by_output
            plan[f"{path}.down_proj"] = by_input
        elif isinstance(module, Experts):
            spread = module.num_held % size == 0
            plan[path] = _SpreadExperts(parts) if spread else _SplitExperts(parts)
    parallelize_module(decoder, mesh, plan)
    if config.tie_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    start = mesh.get_local_rank() * (config.vocab_size // size)
    decoder.vocab_shard = VocabShard(start, mesh.get_group())
    decoder.config = replace(
        config, num_heads=config.num_heads // size, num_kv_heads=config.num_kv_heads // size
    )
    paths = {module: path for path, module in decoder.named_modules()}
    return {
        f"{paths[module]}.{name}": part
        for module, own in parts.items()
        for name, part in own.items()
    }


def _check_divisible(config: DecoderConfig, size: int) -> None:
    sizes = {name: getattr(config, name) for name in ("num_heads", "num_kv_heads", "vocab_size")}
    if config.has_dense_layers:
        sizes["intermediate_size"] = config.intermediate_size
    if config.moe is not None:
        sizes["shared_size"] = config.moe.shared_size
        if config.moe.num_experts % size and config.moe.expert_size % size:
            raise CheckpointError(
                f"--tensor_parallel_size {size} divides neither the model's num_experts = "
                f"{config.moe.num_experts} nor their expert_size = {config.moe.expert_size}"
            )
    for name, value in sizes.items():
        if value % size:
            raise CheckpointError(
                f"--tensor_parallel_size {size} does not divide the model's {name} = {value}"
            )


Parts = dict[nn.Module, dict[str, Part]]


class _Split(ParallelStyle):
    """Keeps this rank's part of a module's parameters.

    Args:
        dim: the dimension of the weight that is split. A bias belongs to the outputs.
        parts: told which part of which parameter was kept.
    """

    def __init__(self, dim: int, parts: Parts) -> None:
        self._dim = dim
        self._parts = parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        rank, size = device_mesh.get_local_rank(), device_mesh.size()
        own = self._parts.setdefault(module, {})
        for name, parameter in list(module.named_parameters(recurse=False)):
            length = parameter.shape[self._dim] // size
            part = own[name] = Slice(self._dim, rank * length, length)
            kept = parameter.detach()[part.index]
            module.register_parameter(name, nn.Parameter(kept, requires_grad=False))
        return module


class _SpreadExperts(ParallelStyle):
    """Keeps some experts, whole."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Experts)
        count = module.num_held // device_mesh.size()
        module.hold(device_mesh.get_local_rank() * count, count)
        part = WholeExperts(module.first, count)
        self._parts[module] = {name: part for name, _ in module.named_parameters()}
        return module


class _SplitExperts(ParallelStyle):
    """Keeps a part of every expert, as of a plain MLP: gate and up by output, down by input. The
    parts are those of an expert's own tensors."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Experts)
        experts, hidden_size, inner = module.down_proj.shape
        length = inner // device_mesh.size()
        start = device_mesh.get_local_rank() * length
        self._parts[module] = {
            "gate_up_proj": Slice(0, start, length),
            "down_proj": Slice(1, start, length),
        }
        for name, shape in (
            ("gate_up_proj", (experts, 2 * length, hidden_size)),
            ("down_proj", (experts, hidden_size, length)),
        ):
            own = module.get_parameter(name).new_empty(shape)
            module.register_parameter(name, nn.Parameter(own, requires_grad=False))
        return module


class _SplitEmbedding(_Split):
    """An embedding that looks up its own tokens; the ranks' results are added."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)
        assert isinstance(module, nn.Embedding)
        part = self._parts[module]["weight"]
        assert isinstance(part, Slice)
        embed = partial(_embed, module, part, device_mesh.get_group())
        module.forward = embed  # type: ignore[method-assign]
        return module


def _embed(module: nn.Embedding, part: Slice, group: ProcessGroup, token_ids: Tensor) -> Tensor:
    own = token_ids - part.start
    known = (own >= 0) & (own < part.length)
    embedded = F.embedding(own.clamp(0, part.length - 1), module.weight)
    embedded = torch.where(known[..., None], embedded, 0)
    dist.all_reduce(embedded, group=group)
    return embedded


class _Sum(ParallelStyle):
    """Adds up what the ranks' parts of a module give."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()

        def add_up(_: nn.Module, __: object, output: Tensor) -> Tensor:
            dist.all_reduce(output, group=group)
            return output

        module.register_forward_hook(add_up)
        return module
