"""One convolution that computes a tensor and reserves others: which rows, in which groups."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from rmprune.errors import ConversionError
from rmprune.linear import (
    POINTWISE,
    Geometry,
    Pair,
    Path,
    Rows,
    Value,
    identity_norm,
    join,
    reparametrised,
    sorted_unique,
)
from rmprune.norms import Norm, normalised
from rmprune.steps import Addition

Downsample = Literal["relu", "prelu"]
Key = TypeVar("Key")


@dataclass(frozen=True)
class _Piece:
    """Some output channels: kernels over the state, and the BN behind them."""

    rows: Rows
    norm: Norm

    def __len__(self) -> int:
        return len(self.rows.columns)


@dataclass(frozen=True)
class _Reserved:
    """Channels of the state that are copied, all with one geometry.

    Attributes:
        channels: ``(n,)``, sorted.
        factor: ``(n,)``: what each is multiplied with, not negative.
        norm: The BN behind the copies.
    """

    channels: Tensor
    factor: Tensor
    norm: Norm


class Layout(Generic[Key]):
    """A convolution whose outputs are a target's channels, then what others need.

    Another tensor is either computed at once (`absorbed`), or the channels of the state that
    it follows from are copied by Dirac kernels; whichever takes fewer channels.

    Args:
        name: What the layer is called in errors.
        target: The tensor to compute.
        others: Tensors that must follow from the new state as well.
        state: ``(N, C, H, W)``, for its size, dtype and device.
        downsample: ``"prelu"`` computes every shortcut at once that is more than a BN.
        follower: What reads the target next, if others still live behind it. A convolution
            gets channels of zeros where they let it be grouped; for an addition the target's
            channels alternate with the other term's, so that the merge can be grouped.
        together: Keys of the others that are computed at once in any case.

    Raises:
        ConversionError: No one convolution can do it.
    """

    def __init__(
        self,
        name: str,
        target: Value,
        others: Mapping[Key, Value],
        state: Tensor,
        downsample: Downsample,
        follower: nn.Conv2d | Addition | None = None,
        together: Collection[Key] = (),
    ) -> None:
        self.name = name
        self.target = target
        self.others = dict(others)
        self.state = state
        self.size: Pair = (state.shape[2], state.shape[3])
        self.own_geometry = self._join([path.geometry for path in target.paths])
        self.stride = self.own_geometry.stride
        self.follower = follower
        self.absorbed = self._choose_absorbed(downsample, together)
        self.geometry = self._join(
            [self.own_geometry]
            + [path.geometry for key in self.absorbed for path in others[key].paths]
            + list(self._needed(key for key in others if key not in self.absorbed))
        )
        self.reserved = self._reserve()
        self.pieces = [
            self._piece(target),
            *(self._piece(others[key]) for key in self.absorbed),
            *(self._copies(geometry, kept) for geometry, kept in self.reserved.items()),
        ]

    # What is reserved, and how.

    def _join(self, geometries: list[Geometry]) -> Geometry:
        geometry = join(geometries, self.size)
        if geometry is None:
            kernels = sorted({(g.kernel, g.stride, g.padding, g.dilation) for g in geometries})
            raise ConversionError(
                self.name,
                "one layer cannot read all that is needed there: kernels, strides, paddings and "
                f"dilations are {', '.join(map(str, kernels))}",
                "inside a block kernels must be odd and the padding (k - 1) / 2",
            )
        return geometry

    def _carried(self, path: Path) -> tuple[Geometry, Geometry] | None:
        """How the channels that a path reads are copied, and the pooling that is left."""
        if self.stride == (1, 1):
            return POINTWISE, path.pool
        if not path.rows.geometry.is_pointwise:
            return None
        if path.pool.stride == self.stride:
            return path.pool, POINTWISE
        left = path.pool.behind(self.stride)
        return None if left is None else (Geometry(stride=self.stride), left)

    def _choose_absorbed(self, downsample: Downsample, together: Collection[Key]) -> list[Key]:
        fixed: list[Key] = []
        optional: list[Key] = []
        absorbed = list(together)
        for key, value in self.others.items():
            if key in together:
                continue
            geometries = [path.geometry for path in value.paths]
            can_absorb = join([self.own_geometry, *geometries], self.size) is not None
            carried = [self._carried(path) for path in value.paths]
            can_copy = all(
                way is not None and join([self.own_geometry, way[0]], self.size) is not None
                for way in carried
            )
            if not can_absorb and not can_copy:
                self._refuse(value)
            at_once = downsample == "prelu" or (
                isinstance(self.follower, Addition) and not _has_shortcut_bn(value)
            )
            at_once = (at_once and _changes_tensor(value)) or _pads(value)
            if not can_copy or (can_absorb and at_once):
                absorbed.append(key)
            elif can_absorb and not _has_shortcut_bn(value):
                optional.append(key)
            else:
                fixed.append(key)
        for key in optional:
            before, after = self._needed(fixed), self._needed([*fixed, key])
            more = sum(map(len, after.values())) - sum(map(len, before.values()))
            (absorbed if self.others[key].channels < more else fixed).append(key)
        return [key for key in self.others if key in absorbed]

    def _refuse(self, value: Value) -> None:
        geometry = self.own_geometry
        raise ConversionError(
            self.name,
            f"behind its kernel {geometry.kernel} with stride {geometry.stride} and padding "
            f"{geometry.padding} another tensor ({value.conv or 'the block’s input'}) is needed "
            "at other positions",
            "inside a block kernels must be odd and the padding (k - 1) / 2",
        )

    def _needed(self, keys: Iterable[Key]) -> dict[Geometry, Tensor]:
        """Channels of the state to copy for some of the others, by geometry."""
        found: dict[Geometry, list[Tensor]] = {}
        for key in keys:
            for path in self.others[key].paths:
                way = self._carried(path)
                assert way is not None
                found.setdefault(way[0], []).append(path.columns())
        return {geometry: sorted_unique(torch.cat(parts)) for geometry, parts in found.items()}

    def _paths_of(self, geometry: Geometry) -> list[Path]:
        return [
            path
            for key, value in self.others.items()
            if key not in self.absorbed
            for path in value.paths
            if (way := self._carried(path)) is not None and way[0] == geometry
        ]

    def _reserve(self) -> dict[Geometry, _Reserved]:
        """Copies take over the BN at the head of the only path that reads them.

        So the channels that a slimmable model's shortcut BN scales get that scale.
        """
        copied = [key for key in self.others if key not in self.absorbed]
        result = {}
        for geometry, channels in self._needed(copied).items():
            zero = self.state.new_zeros(self.state.shape[1])
            readers, norm = zero.clone(), identity_norm(zero)
            for path in self._paths_of(geometry):
                local = path.rows.used()
                readers[path.source[local]] += 1
                for part, head in zip(norm, path.head, strict=True):
                    part[path.source[local]] = head[local]
            shared = readers != 1
            norm = Norm(
                *(torch.where(shared, i, n) for i, n in zip(identity_norm(zero), norm, strict=True))
            )
            norm = Norm(*(part[channels] for part in norm))
            factor = norm.slope.abs()
            scale, rest = norm.gamma.abs(), factor * norm.mean
            _, behind = normalised(
                factor[:, None, None, None], torch.zeros_like(factor), scale, rest
            )
            result[geometry] = _Reserved(channels, factor, behind)
        return result

    # The kernels.

    def _piece(self, value: Value) -> _Piece:
        kernels = [self._placed(path.kernel()) for path in value.paths]
        columns = torch.cat([rows.columns for rows in kernels], 1)
        weight = torch.cat([rows.weight for rows in kernels], 1)
        offset = value.bias + torch.stack([path.offset() for path in value.paths]).sum(0)
        if value.norm is not None:
            norm = value.norm._replace(mean=value.norm.mean - offset)
        else:
            weight, norm = normalised(weight, offset, value.scale, value.rest)
        return _Piece(Rows(columns, weight, self.geometry), norm)

    def _copies(self, geometry: Geometry, kept: _Reserved) -> _Piece:
        divisor = torch.where(kept.norm.gamma > 0, kept.norm.gamma, 1)
        weight = (kept.factor / divisor)[:, None, None, None] / geometry.taps
        rows = Rows(kept.channels[:, None], weight.expand(-1, -1, *geometry.kernel), geometry)
        return _Piece(self._placed(rows), kept.norm)

    def _placed(self, rows: Rows) -> Rows:
        """The same kernels among the taps of the common geometry."""
        if rows.geometry == self.geometry:
            return rows
        taps = [
            [self.geometry.offsets(axis).index(offset) for offset in rows.geometry.offsets(axis)]
            for axis in (0, 1)
        ]
        weight = rows.weight.new_zeros(*rows.weight.shape[:2], *self.geometry.kernel)
        down, across = torch.tensor(taps[0])[:, None], torch.tensor(taps[1])[None, :]
        weight[:, :, down, across] = rows.weight
        return Rows(rows.columns, weight, self.geometry)

    def layer(self, alone: bool = False) -> tuple[nn.Conv2d, Norm, Tensor]:
        """Write the convolution.

        Args:
            alone: Whether the outputs shall be the rows in order and nothing else.

        Returns:
            The convolution, without bias; the BN behind it; and where the channels of the
            pieces stand in its output.
        """
        inputs, taps = self.state.shape[1], self.geometry.taps
        spans = torch.cat([_span(piece.rows) for piece in self.pieces])
        own, rows = self.target.channels, len(spans)
        groups, width, cost = _grouping(spans, inputs, taps, own)
        in_order = torch.arange(rows, device=spans.device)
        if alone and (
            groups * width > rows
            or not torch.equal(_places(spans, groups, width, inputs), in_order)
        ):
            groups, width, cost = 1, rows, 0
        alternating = isinstance(self.follower, Addition) and rows == 2 * own
        if alternating and rows * (inputs * taps + 1) < cost:
            groups, width = 1, rows
            places = in_order.view(own, 2).T.flatten()
        else:
            places = _places(spans, groups, width, inputs)
        if groups == 1 and isinstance(self.follower, nn.Conv2d):
            width += self._fillers(self.follower, rows, inputs)
        total, share = groups * width, inputs // groups
        conv = nn.Conv2d(
            inputs,
            total,
            self.geometry.kernel,
            self.geometry.stride,
            self.geometry.padding,
            self.geometry.dilation,
            groups,
            bias=False,
            dtype=self.state.dtype,
            device=self.state.device,
        )
        weight = self.state.new_zeros(total, share, *self.geometry.kernel)
        start = 0
        for piece in self.pieces:
            outputs = places[start : start + len(piece)]
            start += len(piece)
            columns = piece.rows.columns
            here = outputs[:, None].expand_as(columns)
            there = columns - (outputs // width * share)[:, None]
            inside = columns >= 0
            if bool(inside.all()):
                weight.index_put_((here, there), piece.rows.weight, accumulate=True)
            else:
                values = piece.rows.weight[inside]
                weight.index_put_((here[inside], there[inside]), values, accumulate=True)
        conv.weight = nn.Parameter(weight)
        zero = self.state.new_zeros(total)
        parts = zip(*(piece.norm for piece in self.pieces), strict=True)
        fill = Norm(zero, zero, zero, zero + 1)
        norm = Norm(
            *(
                base.index_copy(0, places, torch.cat(part))
                for base, part in zip(fill, parts, strict=True)
            )
        )
        return conv, norm, places

    def _fillers(self, follower: nn.Conv2d, rows: int, inputs: int) -> int:
        """How many channels of zeros make this convolution and its follower cheapest."""
        share = follower.in_channels // follower.groups
        own = self.target.channels
        best, fewest = 0, float("inf")
        for fillers in {0, -rows % share}:
            spans = _follower_spans(follower, own, rows - own + fillers)
            taps = follower.kernel_size[0] * follower.kernel_size[1]
            _, _, cost = _grouping(spans, rows + fillers, taps, own)
            cost += fillers * inputs * self.geometry.taps
            if cost < fewest:
                best, fewest = fillers, cost
        return best

    # What follows.

    def can_shift(self) -> bool:
        """Whether copies may be carried with an offset: not if they are to be padded later."""
        return not any(
            _pads(value) for key, value in self.others.items() if key not in self.absorbed
        )

    def values(self, places: Tensor, factor: Tensor, shift: Tensor, born: int) -> dict[Key, Value]:
        """The others, as they follow from the new state.

        Args:
            places: As `layer` returned them.
            factor: ``(channels,)``: what the new state's channels were multiplied with
                besides, to be carried past an activation.
            shift: ``(channels,)``: what was added to them.
            born: The number of the layer.
        """
        result = {}
        start = self.target.channels
        for key in self.absorbed:
            channels = places[start : start + self.others[key].channels]
            start += len(channels)
            value = Value.of_state(channels, self.state, born)
            path = value.paths[0]
            head = reparametrised(path.head, factor[channels], shift[channels])
            result[key] = replace(value, paths=(replace(path, head=head),))
        moved = {}
        for geometry, kept in self.reserved.items():
            place = torch.zeros(self.state.shape[1], dtype=torch.long, device=places.device)
            place[kept.channels] = places[start : start + len(kept.channels)]
            times = self.state.new_ones(self.state.shape[1])
            times[kept.channels] = kept.factor
            start += len(kept.channels)
            moved[geometry] = place, times
        for key, value in self.others.items():
            if key not in self.absorbed:
                paths = (self._moved(path, moved, factor, shift, born) for path in value.paths)
                result[key] = replace(value, paths=tuple(paths))
        return result

    def _moved(
        self,
        path: Path,
        moved: Mapping[Geometry, tuple[Tensor, Tensor]],
        factor: Tensor,
        shift: Tensor,
        born: int,
    ) -> Path:
        way = self._carried(path)
        assert way is not None
        geometry, left = way
        place, times = moved[geometry]
        source = place[path.source]
        head = reparametrised(path.head, factor[source] * times[path.source], shift[source])
        return replace(path, source=source, head=head, pool=left, born=born)


def weights_with_and_without_merging(
    value: Value, rows: Rows, again: bool, copied: Tensor, inputs: int
) -> tuple[float, float]:
    """MACs an output position if a convolution of a value reads the state, or the value.

    Args:
        value: What is pending before the convolution.
        rows: The convolution.
        again: Whether the value is needed later, too.
        copied: The channels of the state that other tensors read, ``(n,)``.
        inputs: Channels of the state.
    """
    kernels = [path.kernel() for path in value.paths]
    between = _span(Rows(torch.cat([k.columns for k in kernels], 1), kernels[0].weight))
    pending = max(k.geometry.taps for k in kernels)
    conv, area = _span(rows), math.prod(rows.geometry.stride)
    copies = copied[:, None].expand(-1, 2)
    kept = between if again else between[:0]

    read = value.read()
    reach = read[[0, -1]].expand(len(conv), 2)
    spans = torch.cat([reach, kept, copies])
    _, width, _ = _grouping(spans, inputs, rows.geometry.taps, 1)
    merged = width * inputs * rows.geometry.taps * pending / area

    _, width, _ = _grouping(torch.cat([between, copies]), inputs, pending, 1)
    first = width * inputs * pending
    total = value.channels + len(copied)
    others = torch.arange(0 if again else value.channels, total, device=read.device)
    spans = torch.cat([conv, others[:, None].expand(-1, 2)])
    _, width, _ = _grouping(spans, total, rows.geometry.taps, 1)
    return merged, first + width * total * rows.geometry.taps / area


def _changes_tensor(value: Value) -> bool:
    """Whether a value is more than a factor and an offset for each channel of the state."""
    return len(value.paths) > 1 or any(
        not path.geometry.is_pointwise
        or not path.rows.reads_one
        or bool((path.rows.columns < 0).any())
        for path in value.paths
    )


def _pads(value: Value) -> bool:
    """Whether a value reads zeros around the state."""
    return any(path.geometry.pads for path in value.paths)


def _has_shortcut_bn(value: Value) -> bool:
    """Whether channels of the state come through BNs, whose scales their copies shall have."""
    return any(bool((path.head.gamma != 1).any()) for path in value.paths)


def _span(rows: Rows) -> Tensor:
    """``(out, 2)``: the first and the last channel that an output reads; -1 if none."""
    columns = rows.columns
    last = columns.amax(1)
    first = torch.where(columns < 0, columns.max() + 1, columns).amin(1)
    return torch.stack([torch.where(last < 0, -1, first), last], 1)


def _grouping(spans: Tensor, inputs: int, taps: int, reader: int) -> tuple[int, int, int]:
    """The number of groups that costs least, the outputs of each, and what they cost.

    Args:
        spans: As `_span` gives them, ``(out, 2)``.
        inputs: Channels of the input.
        taps: Of the kernel.
        reader: What an output channel costs the layer that reads it; groups of unequal
            outputs are filled with channels of zeros.
    """
    best, fewest = (1, len(spans)), len(spans) * (inputs * taps + reader)
    for groups in range(2, inputs + 1):
        if inputs % groups:
            continue
        group = spans // (inputs // groups)
        reading = group[spans[:, 1] >= 0]
        if bool((reading[:, 0] != reading[:, 1]).any()):
            continue
        width = -(-len(spans) // groups)
        if len(reading):
            width = max(width, int(reading[:, 0].bincount().max()))
        cost = width * (inputs * taps + groups * reader)
        if cost < fewest:
            best, fewest = (groups, width), cost
    return *best, fewest


def _places(spans: Tensor, groups: int, width: int, inputs: int) -> Tensor:
    """Where every row stands: behind the other rows of its group, in order."""
    if groups == 1:
        return torch.arange(len(spans), device=spans.device)
    group = (spans[:, 1] // (inputs // groups)).tolist()
    filled = [0] * groups
    places = [0] * len(spans)
    for row in sorted(range(len(spans)), key=lambda r: group[r] < 0):
        where = group[row] if group[row] >= 0 else min(range(groups), key=filled.__getitem__)
        places[row] = where * width + filled[where]
        filled[where] += 1
    return torch.tensor(places, device=spans.device)


def _follower_spans(conv: nn.Conv2d, own: int, reserved: int) -> Tensor:
    """Spans of a convolution that reserves: its own rows, then one for each copy."""
    share, width = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    first = torch.arange(conv.out_channels) // width * share
    copies = own + torch.arange(reserved)
    return torch.cat([torch.stack([first, first + share - 1], 1), torch.stack([copies, copies], 1)])
