"""How published checkpoints name a decoder's parameters, and which parts of them a tensor is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

Shape = tuple[int, ...]
NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")


@dataclass(frozen=True)
class Place:
    """Where rows of a published tensor go.

    Attributes:
        parameter: name in `Decoder`.
        index: the part of the parameter, contiguous; () is all of it.
        shape: of that part.
        first_row: the tensor's row that the part begins with.
    """

    parameter: str
    index: tuple[int | slice, ...]
    shape: Shape
    first_row: int = 0

    @property
    def size(self) -> int:
        """Elements of the part."""
        return math.prod(self.shape)

    def part(self, dim: int, length: int) -> Place:
        """Where `length` entries along the tensor's dimension `dim` go, in a parameter that has as
        many less."""
        index = self.index
        if dim == 0 and index:
            expert, rows = index
            assert isinstance(rows, slice)
            first = rows.start // self.shape[0] * length
            index = (expert, slice(first, first + length))
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return replace(self, index=index, shape=shape)

    def among_experts(self, first: int, count: int) -> Place | None:
        """Where the part goes in a parameter that stacks `count` experts from `first` on only; None
        when it is another expert's."""
        expert, rows = self.index
        assert isinstance(expert, int)
        if not first <= expert < first + count:
            return None
        return replace(self, index=(expert - first, rows))


@dataclass(frozen=True)
class TensorNames:
    """A published format. In every name `{}` stands for a number: the layer's, then the expert's.

    Attributes:
        by_published: tensor -> the parameter that it is.
        stacked: parameter [experts, rows, ...] -> the tensors of an expert, whose rows follow one
            another.
        fused: tensor -> the parameters whose rows follow one another in it.
    """

    by_published: Mapping[str, str]
    stacked: Mapping[str, Sequence[str]] = field(default_factory=dict)
    fused: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def count(self, tensors: Iterable[str]) -> tuple[int, int]:
        """How many layers the names of tensors speak of, and how many experts."""
        known = {*self.by_published, *self.fused}.union(*self.stacked.values())
        layers, experts = set(), set()
        for name in tensors:
            if NUMBER.sub("{}", name) in known:
                layer, *expert = NUMBER.findall(name) or [None]
                layers.add(layer)
                experts.update(expert)
        return len(layers - {None}), len(experts)

    def places(
        self, parameters: Mapping[str, Shape], most_experts: int | None = None
    ) -> dict[str, list[Place]]:
        """Every tensor that a checkpoint of `parameters` must hold, and where it goes.

        Args:
            parameters: shapes by name in `Decoder`.
            most_experts: how many experts of a layer are listed; None is all.
        """
        places: dict[str, list[Place]] = {}
        for name, shape in parameters.items():
            for tensor, place in self._sources(name, shape, parameters, most_experts):
                places.setdefault(tensor, []).append(place)
        return places

    def published_name(self, parameter_name: str) -> str:
        """The checkpoint's name of a parameter that is one tensor."""
        pattern, layer = _pattern(parameter_name)
        by_parameter = {ours: theirs for theirs, ours in self.by_published.items()}
        return by_parameter[pattern].format(layer)

    def _sources(
        self, name: str, shape: Shape, parameters: Mapping[str, Shape], most_experts: int | None
    ) -> Iterator[tuple[str, Place]]:
        pattern, layer = _pattern(name)
        if pattern in self.stacked:
            tensors = self.stacked[pattern]
            rows = shape[1] // len(tensors)
            for expert in range(shape[0])[:most_experts]:
                for i, tensor in enumerate(tensors):
                    part = slice(i * rows, (i + 1) * rows)
                    place = Place(name, (expert, part), (rows, *shape[2:]))
                    yield tensor.format(layer, expert), place
            return
        for tensor, members in self.fused.items():
            if pattern in members:
                before = [parameters[m.format(layer)] for m in members[: members.index(pattern)]]
                first_row = sum(rows for rows, *_ in before)
                yield tensor.format(layer), Place(name, (), shape, first_row)
                return
        yield self.published_name(name), Place(name, (), shape)


def tensor_shape(places: Sequence[Place]) -> Shape:
    """The shape of the tensor whose rows go to `places`."""
    rows = sum(place.shape[0] for place in places)
    return rows, *places[0].shape[1:]


def _pattern(name: str) -> tuple[str, str]:
    """A parameter's name with `{}` for its layer, and the layer."""
    parts = name.split(".")
    layer = next((part for part in parts if part.isdigit()), "")
    return ".".join("{}" if part == layer and layer else part for part in parts), layer
