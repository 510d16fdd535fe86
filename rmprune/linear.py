"""Linear maps over the channels of one tensor: what conversion has read but not yet written.

A `Value` is a tensor of the residual network, written as a sum of paths from the *state*, the
output of the plain layer written last. Convolutions, BNs, additions and concatenations only
make values out of values; a layer is written when something that is not linear needs one.
Tensors in, tensors out; nothing here knows of graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rmprune.norms import Norm

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Which positions a kernel reads: tap i of output y reads ``stride·y + dilation·i − padding``.

    Attributes:
        kernel: Taps, down and across.
        stride: As of a convolution.
        padding: Zeros in front, and as many behind.
        dilation: As of a convolution.
    """

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def is_pointwise(self) -> bool:
        """Whether each output reads one position, and every position is read."""
        return self == Geometry()

    @property
    def pads(self) -> bool:
        """Whether zeros around the input are read."""
        return self.padding != (0, 0)

    @property
    def taps(self) -> int:
        """Positions that one output reads."""
        return math.prod(self.kernel)

    def offsets(self, axis: int) -> list[int]:
        """Positions read, relative to ``stride·y``."""
        first, step = -self.padding[axis], self.dilation[axis]
        return [first + step * tap for tap in range(self.kernel[axis])]

    def output_size(self, size: Pair) -> Pair:
        """Height and width of the output for those of the input."""
        extent = [
            n + 2 * p - d * (k - 1)
            for n, k, p, d in zip(size, self.kernel, self.padding, self.dilation, strict=True)
        ]
        return (extent[0] - 1) // self.stride[0] + 1, (extent[1] - 1) // self.stride[1] + 1

    def after(self, first: Geometry) -> Geometry | None:
        """The geometry of this one applied to the output of another, where one of them is
        subsampling, or the first one padding; None elsewhere."""
        stride = _times(self.stride, first.stride)
        if first.kernel == (1, 1):
            dilation = [
                d * s if k > 1 else 1
                for k, d, s in zip(self.kernel, self.dilation, first.stride, strict=True)
            ]
            down, across = _times(self.padding, first.stride)
            padding = (down + first.padding[0], across + first.padding[1])
            return Geometry(self.kernel, stride, padding, (dilation[0], dilation[1]))
        if self.kernel == (1, 1) and not self.pads:
            return replace(first, stride=stride)
        return None

    def behind(self, stride: Pair) -> Geometry | None:
        """What is left of this one behind a subsampling, or None if that drops what it reads."""
        amounts = [*zip(self.stride, stride, strict=True), *zip(self.padding, stride, strict=True)]
        steps = [
            (d, s) for k, d, s in zip(self.kernel, self.dilation, stride, strict=True) if k > 1
        ]
        if any(amount % step for amount, step in [*amounts, *steps]):
            return None
        dilation = [max(d // s, 1) for d, s in zip(self.dilation, stride, strict=True)]
        return Geometry(
            self.kernel,
            (self.stride[0] // stride[0], self.stride[1] // stride[1]),
            (self.padding[0] // stride[0], self.padding[1] // stride[1]),
            (dilation[0], dilation[1]),
        )


def _times(a: Pair, b: Pair) -> Pair:
    return a[0] * b[0], a[1] * b[1]


POINTWISE = Geometry()


def join(geometries: Iterable[Geometry], size: Pair) -> Geometry | None:
    """The smallest kernel that reads whatever any of the given ones reads.

    Returns:
        None if there is none that puts out the same positions: strides or sizes differ.
    """
    all_ = list(dict.fromkeys(geometries))
    main = max(all_, key=lambda g: g.taps)
    if len({(g.stride, g.output_size(size)) for g in all_}) != 1:
        return None
    if all(_reads(main, g, axis) for g in all_ for axis in (0, 1)):
        return main
    kernel, padding, dilation = [], [], []
    for axis in (0, 1):
        offsets = {offset for g in all_ for offset in g.offsets(axis)}
        step = math.gcd(*offsets) or 1
        half = max(abs(offset) for offset in offsets) // step
        kernel.append(2 * half + 1)
        padding.append(half * step)
        dilation.append(step)
    wide = Geometry(
        (kernel[0], kernel[1]), main.stride, (padding[0], padding[1]), (dilation[0], dilation[1])
    )
    return wide if wide.output_size(size) == main.output_size(size) else None


def _reads(wide: Geometry, narrow: Geometry, axis: int) -> bool:
    return set(narrow.offsets(axis)) <= set(wide.offsets(axis))


@dataclass(frozen=True)
class Rows:
    """Sparse kernels: what each output reads.

    Attributes:
        columns: ``(out, n)``: channels that an output reads; -1 for none.
        weight: ``(out, n, kernel height, kernel width)``; 0 where there is no column.
        geometry: Of the kernels.
    """

    columns: Tensor
    weight: Tensor
    geometry: Geometry = POINTWISE

    @classmethod
    def selection(cls, columns: Tensor, like: Tensor) -> Rows:
        """Each output is one channel, or zero where the column is -1."""
        weight = (columns >= 0).to(like)[:, None, None, None]
        return cls(columns[:, None], weight)

    @classmethod
    def of_conv(cls, weight: Tensor, groups: int, geometry: Geometry) -> Rows:
        """A convolution's kernels, ``(out, in / groups, height, width)``."""
        outputs, width = weight.shape[:2]
        group = torch.arange(outputs, device=weight.device) // (outputs // groups)
        if groups == 1:
            columns = torch.arange(width, device=weight.device).expand(outputs, width)
        else:
            columns = group[:, None] * width + torch.arange(width, device=weight.device)
        return cls(columns, weight, geometry)

    @property
    def reads_one(self) -> bool:
        """Whether each output is one channel at one position, with a factor."""
        return self.columns.shape[1] == 1 and self.geometry.is_pointwise

    def used(self) -> Tensor:
        """The channels that any output reads, sorted."""
        if self.columns.stride(0) == 0:
            return self.columns[0]
        found = sorted_unique(self.columns)
        return found[found >= 0]

    def scaled(self, factor: Tensor) -> Rows:
        """Outputs times a factor each, ``(out,)``."""
        return replace(self, weight=self.weight * factor[:, None, None, None])

    def select(self, outputs: Tensor) -> Rows:
        """The given outputs alone; zero where the index is -1."""
        columns, weight = self.columns[outputs], self.weight[outputs]
        none = outputs < 0
        if none.any():
            columns, weight = columns.clone(), weight.clone()
            columns[none], weight[none] = -1, 0
        return replace(self, columns=columns, weight=weight)

    def times_columns(self, factor: Tensor) -> Rows:
        """Each read channel times a factor, ``(channels,)``."""
        return replace(self, weight=self.weight * factor[self.columns][:, :, None, None])

    def matrix(self, used: Tensor) -> Tensor:
        """``(out, len(used), kernel height, kernel width)`` over the given channels."""
        place = torch.full((int(max(self.columns.max(), used.max())) + 2,), -1, device=used.device)
        place[used] = torch.arange(len(used), device=used.device)
        outputs, width = self.columns.shape
        dense = self.weight.new_zeros(outputs, len(used), *self.geometry.kernel)
        where = place[self.columns]
        keep = where >= 0
        rows = torch.arange(outputs, device=used.device)[:, None].expand(outputs, width)
        dense.index_put_((rows[keep], where[keep]), self.weight[keep], accumulate=True)
        return dense

    def without_zeros(self) -> Rows:
        """The same without columns that an output does not read: in groups again, if it was."""
        reads = (self.weight != 0).any(3).any(2)
        most = int(reads.sum(1).max())
        if most == reads.shape[1]:
            return self
        order = torch.argsort(reads.int(), dim=1, descending=True, stable=True)[:, :most]
        columns = torch.where(reads.gather(1, order), self.columns.gather(1, order), -1)
        rows = torch.arange(len(order), device=order.device)[:, None]
        return replace(self, columns=columns, weight=self.weight[rows, order])

    def before(self, outer: Rows) -> Rows:
        """``outer`` applied to these rows; one of the two geometries is pointwise."""
        if self.reads_one:
            columns = self.columns[outer.columns, 0]
            factor = self.weight[outer.columns, 0]
            missing = outer.columns < 0
            if missing.any():
                columns = torch.where(missing, -1, columns)
            return Rows(columns, outer.weight * factor, outer.geometry)
        if outer.reads_one:
            chosen = self.select(outer.columns[:, 0])
            return chosen.scaled(outer.weight[:, 0, 0, 0])
        used = self.used()
        middle = torch.arange(len(self.columns), device=used.device)
        inner, mixing = self.matrix(used), outer.matrix(middle)
        if self.geometry.is_pointwise:
            product = torch.einsum("omhw,mi->oihw", mixing, inner[:, :, 0, 0])
            geometry = outer.geometry
        else:
            product = torch.einsum("om,mihw->oihw", mixing[:, :, 0, 0], inner)
            geometry = self.geometry
        return Rows(used.expand(len(product), len(used)), product, geometry).without_zeros()


@dataclass(frozen=True)
class Path:
    """``rows · pool · head`` of some channels of the state.

    Attributes:
        source: ``(n,)``: the channels of the state that the rows' columns mean.
        head: The BN on these channels, the shortcut BN of a slimmable model for one; its
            gamma is the scale with which they are carried.
        pool: Averaging over a window that comes next; a kernel of 1 is subsampling or padding.
            Where it is not pointwise, the rows are.
        rows: What follows.
        born: When the layer that computed the source was written.
    """

    source: Tensor
    head: Norm
    pool: Geometry
    rows: Rows
    born: int

    @property
    def geometry(self) -> Geometry:
        """Of the whole path."""
        return self.rows.geometry if self.pool.is_pointwise else self.pool

    def before(self, outer: Rows) -> Path | None:
        """``outer`` applied to this path, or None if its kernel is no kernel over the state."""
        if outer.geometry.is_pointwise or self.geometry.is_pointwise:
            return replace(self, rows=self.rows.before(outer))
        geometry = outer.geometry.after(self.pool)
        if self.pool.taps > 1 or not self.rows.geometry.is_pointwise or geometry is None:
            return None
        return replace(
            self, pool=POINTWISE, rows=replace(self.rows.before(outer), geometry=geometry)
        )

    def columns(self) -> Tensor:
        """Channels of the state that are read, sorted."""
        return sorted_unique(self.source[self.rows.used()])

    def kernel(self) -> Rows:
        """The path's kernels over the state, without its offsets."""
        rows = self.rows.times_columns(self.head.slope)
        if not self.pool.is_pointwise:
            spread = rows.weight.expand(-1, -1, *self.pool.kernel) / self.pool.taps
            rows = Rows(rows.columns, spread, self.pool)
        columns = torch.where(rows.columns < 0, -1, self.source[rows.columns])
        return replace(rows, columns=columns if len(self.source) else rows.columns)

    def offset(self) -> Tensor:
        """``(out,)``: what the head's offsets contribute; exact where nothing is padded."""
        offsets = self.head.offset[self.rows.columns][:, :, None, None]
        return (self.rows.weight * offsets).sum((1, 2, 3))

    def has_offset(self) -> bool:
        """Whether the head adds anything."""
        return bool((self.head.offset[self.rows.used()] != 0).any())


@dataclass(frozen=True)
class Value:
    """A tensor of the residual network: ``norm(Σ paths + bias)``.

    Attributes:
        paths: At least one; their outputs are the value's channels.
        bias: ``(channels,)``.
        norm: A BN behind the sum, kept apart so that the plain net gets it as it is.
        scale: ``(channels,)``: |γ| of the BN that a channel comes from, 1 without one.
        rest: ``(channels,)``: what is left of a channel when its scale is 0.
        conv: Name of the convolution that the plain net's layer shall be called after.
        bn: Name of its BN.
    """

    paths: tuple[Path, ...]
    bias: Tensor
    norm: Norm | None
    scale: Tensor
    rest: Tensor
    conv: str = ""
    bn: str = ""

    @classmethod
    def of_state(cls, channels: Tensor, like: Tensor, born: int) -> Value:
        """The given channels of the state, as they are."""
        zero = like.new_zeros(len(channels))
        positions = torch.arange(len(channels), device=channels.device)
        rows = Rows.selection(positions, like)
        path = Path(channels, identity_norm(zero), POINTWISE, rows, born)
        return cls((path,), zero, None, zero + 1, zero)

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return len(self.bias)

    @property
    def born(self) -> int:
        """When the newest of its sources was written."""
        return max(path.born for path in self.paths)

    def selected(self) -> Tensor | None:
        """The state's channels that the value consists of, or None if it is not a selection."""
        path = self.paths[0]
        if len(self.paths) > 1 or self.norm is not None or not path.geometry.is_pointwise:
            return None
        if not path.rows.reads_one or (self.bias != 0).any():
            return None
        columns = path.rows.columns[:, 0]
        factor = path.rows.weight[:, 0, 0, 0] * path.head.slope[columns]
        if (columns < 0).any() or (factor != 1).any() or path.has_offset():
            return None
        return path.source[columns]

    def read(self) -> Tensor:
        """The channels of the state that are read, sorted."""
        return sorted_unique(torch.cat([path.columns() for path in self.paths]))

    def folded(self) -> Value:
        """The same without a BN apart."""
        if self.norm is None:
            return self
        slope, offset = self.norm.slope, self.norm.offset
        paths = tuple(replace(path, rows=path.rows.scaled(slope)) for path in self.paths)
        return replace(self, paths=paths, bias=slope * self.bias + offset, norm=None)

    def normed(self, norm: Norm, bn: str = "") -> Value:
        """A BN behind the value."""
        value = self.folded()
        path = value.paths[0]
        untouched = path.head.gamma.eq(1).all() and not path.has_offset()
        if value.selected() is not None and untouched and len(path.source) == self.channels:
            places = path.rows.columns[:, 0]
            inverse = torch.argsort(places)
            head = Norm(*(part[inverse] for part in norm))
            return replace(
                value,
                paths=(replace(path, head=head),),
                scale=norm.gamma.abs(),
                rest=norm.beta,
                bn=bn,
            )
        return replace(value, norm=norm, scale=norm.gamma.abs(), rest=norm.beta, bn=bn)

    def scaled(self, factor: Tensor, offset: Tensor | None = None) -> Value:
        """Channels times a factor each, ``(channels,)``, plus an offset."""
        value = self.folded()
        paths = tuple(replace(path, rows=path.rows.scaled(factor)) for path in value.paths)
        bias, rest = factor * value.bias, factor * value.rest
        if offset is not None:
            bias, rest = bias + offset, rest + offset
        return replace(value, paths=paths, bias=bias, scale=factor.abs() * value.scale, rest=rest)

    def select(self, channels: Tensor) -> Value:
        """The given channels alone; zero where the index is -1."""
        value = self.folded()
        paths = tuple(replace(path, rows=path.rows.select(channels)) for path in value.paths)
        bias, scale, rest = (part[channels] for part in (value.bias, value.scale, value.rest))
        none = channels < 0
        bias, scale, rest = (torch.where(none, 0, part) for part in (bias, scale, rest))
        return replace(value, paths=paths, bias=bias, scale=scale, rest=rest)

    def pooled(self, geometry: Geometry) -> Value | None:
        """Averages over windows, or None if a layer must be written first."""
        value = self.folded()
        paths = []
        for path in value.paths:
            pool = geometry.after(path.pool)
            constant = path.has_offset() or bool((value.bias != 0).any())
            if pool is None or not path.rows.geometry.is_pointwise or (geometry.pads and constant):
                return None
            paths.append(replace(path, pool=pool))
        return replace(value, paths=tuple(paths))

    def convolved(self, rows: Rows, bias: Tensor | None, name: str) -> Value | None:
        """A convolution of the value, or None if a layer must be written first."""
        value: Value | None = self.folded()
        geometry = rows.geometry
        if geometry.kernel == (1, 1) and not geometry.is_pointwise:
            value = self.pooled(geometry)
            rows = replace(rows, geometry=POINTWISE)
        if value is None:
            return None
        shift = (rows.weight.sum((2, 3)) * value.bias[rows.columns]).sum(1)
        constant = bool((value.bias != 0).any()) or any(p.has_offset() for p in value.paths)
        paths = [path.before(rows) for path in value.paths]
        known = tuple(path for path in paths if path is not None)
        if len(known) < len(paths) or (constant and rows.geometry.pads):
            return None
        out = shift if bias is None else shift + bias
        return Value(known, out, None, torch.ones_like(out), out, conv=name)


def add(values: Sequence[Value]) -> Value:
    """The sum of values of equal shape; the layer is called after the deepest of them."""
    terms = [value.folded() for value in values]
    name = max(terms, key=lambda value: (value.born, value.conv != ""))
    scale = torch.stack([value.scale for value in terms]).amax(0)
    return Value(
        tuple(path for value in terms for path in value.paths),
        torch.stack([value.bias for value in terms]).sum(0),
        None,
        scale,
        torch.stack([value.rest for value in terms]).sum(0),
        name.conv,
        name.bn,
    )


def concatenate(values: Sequence[Value]) -> Value:
    """The values' channels behind each other."""
    total = sum(value.channels for value in values)
    parts, start = [], 0
    for value in values:
        index = torch.full((total,), -1, device=value.bias.device)
        index[start : start + value.channels] = torch.arange(value.channels)
        parts.append(value.select(index))
        start += value.channels
    return add(parts)


def sorted_unique(values: Tensor) -> Tensor:
    """The different values, in order."""
    return torch.unique(values)  # type: ignore[no-any-return]


def identity_norm(zero: Tensor) -> Norm:
    """A BN that does nothing, for as many channels as there are zeros."""
    return Norm(zero + 1, zero, zero, zero + 1)


def reparametrised(head: Norm, factor: Tensor, shift: Tensor) -> Norm:
    """The same map when the channels come as ``factor · x + shift``; all ``(channels,)``."""
    safe = torch.where(factor == 0, 1, factor)
    return head._replace(mean=factor * head.mean + shift, var=head.var * safe.square())
