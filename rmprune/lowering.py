"""What a surviving shortcut becomes: Dirac filters, or an addition again where that is faster.

A plain net carries a tensor past a block by Dirac filters, which cost what other filters do
(two 3×3 layers with n reserved channels: twice the block's MACs). On hardware where an
addition is nearly free, a block is better off with one. Here it gets it back, of the channels
that pruning left alone. Everything is read off the list of layers, with whatever network it
was converted from:

    find     a `Span` of convolutions whose first one copies channels of the tensor x, whose
             middle ones copy them on, and whose last one reads them at its centre tap;
    prepare  positive factors on the copied channels move through ReLUs into the next layer,
             and channels change places, so that the addition needs neither multiplications
             nor gathering where that can be had;
    lower    each span in the form that is fastest where the net shall run.

The prepared net is still a list of plain layers, and every form computes the same.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rmprune.backends import ONE_IMAGE, Platform, time_deployed
from rmprune.convert import check_equal
from rmprune.layers import ChannelSelection, PartialActivation, ResidualBlock
from rmprune.plain import PlainNet, Width
from rmprune.rewrite import fold_bn, pointwise, with_weights

Form = Literal["plain", "selection", "convolution"]
Layers = list[tuple[str, nn.Module]]
Key = tuple[Any, ...]

# f(a z) = a f(z) for a > 0, and what is not negative passes ReLU and LeakyReLU unchanged.
RECTIFIERS = (nn.ReLU, nn.LeakyReLU)
KINDS = ("added", "own", "passed")  # made by F and S together, by F alone, by S alone
SILENT = (nn.Identity, nn.modules.dropout._DropoutNd)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Span:
    """Layers ``start`` to ``stop`` (excluded) that compute ``F(x) + S(x)``, S by Dirac filters.

    Attributes:
        start: The convolution that copies channels of x.
        stop: Behind the convolution that reads the copies.
        own: For each layer between, and the first one: which of its output channels F needs.
        shortcut: S, ``(out, in)``.
        stride: Of S.
    """

    start: int
    stop: int
    own: tuple[Tensor, ...]
    shortcut: Tensor
    stride: int

    @property
    def is_selection(self) -> bool:
        """Whether S takes single channels, each to one place at most."""
        used = self.shortcut != 0
        return bool((used.sum(0) <= 1).all() and (used.sum(1) <= 1).all())


def dense_weight(conv: nn.Conv2d) -> Tensor:
    """A grouped convolution's weight with the zeros between its groups.

    Returns:
        ``(out, in, k, k)``.
    """
    weight = conv.weight.detach()
    if conv.groups == 1:
        return weight
    blocks = weight.reshape(conv.groups, -1, *weight.shape[1:])
    dense = weight.new_zeros(conv.groups, blocks.shape[1], conv.groups, *weight.shape[1:])
    every = torch.arange(conv.groups)
    dense[every, :, every] = blocks
    return dense.flatten(0, 1).flatten(1, 2)


def copied_channels(conv: nn.Conv2d) -> Tensor:
    """Which input channel each output channel is a positive multiple of, ``(out,)``; or -1."""
    weight = dense_weight(conv)
    used = weight.flatten(2).ne(0)
    source = used.any(2).int().argmax(1)
    factors = _centre(weight).gather(1, source[:, None])[:, 0]
    copies = (used.flatten(1).sum(1) == 1) & (factors > 0)
    if conv.bias is not None:
        copies &= conv.bias.detach() == 0
    return torch.where(copies & _keeps_size(conv), source, -1)


def _centre(weight: Tensor) -> Tensor:
    """The centre taps of ``(out, in, k, k)``, as ``(out, in)``."""
    return weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2]


def _keeps_size(conv: nn.Conv2d) -> bool:
    """Whether the centre tap reads x[s·i], as a shortcut does."""
    if isinstance(conv.padding, str) or conv.stride[0] != conv.stride[1]:
        return False
    sides = zip(conv.kernel_size, conv.dilation, conv.padding, strict=True)
    return all(k % 2 == 1 and p == d * (k // 2) for k, d, p in sides)


def find_spans(layers: Layers) -> list[Span]:
    """All places where a list of layers carries channels past others, from front to back.

    Args:
        layers: Without BNs; see `rmprune.rewrite.fold_bn`.
    """
    spans: list[Span] = []
    position = 0
    while position < len(layers):
        span = _span_at(layers, position)
        if span is not None:
            spans.append(span)
        position = position + 1 if span is None else span.stop
    return spans


def _span_at(layers: Layers, start: int) -> Span | None:
    first = layers[start][1]
    if not isinstance(first, nn.Conv2d):
        return None
    source = copied_channels(first)
    reserved = source >= 0
    if not reserved.any() or reserved.all():
        return None
    carried = _Carried(reserved, source, (~reserved,), first.stride[0])
    return _followed(layers, start, start + 1, carried, _is_non_negative(layers[:start]))


@dataclass(frozen=True)
class _Carried:
    """What is known behind some layer of a span.

    Attributes:
        reserved: Which channels are copies of x's, ``(channels,)`` of bool.
        source: Of which ones, ``(channels,)``.
        own: The other channels of each layer so far.
        stride: At which positions of x.
    """

    reserved: Tensor
    source: Tensor
    own: tuple[Tensor, ...]
    stride: int


def _followed(
    layers: Layers, start: int, here: int, carried: _Carried, non_negative: bool
) -> Span | None:
    """The span from ``start`` on, of which the layers before ``here`` are known."""
    if here == len(layers):
        return None
    module, reserved = layers[here][1], carried.reserved
    if not isinstance(module, nn.Conv2d):
        if not _passes(module, reserved, non_negative):
            return None
        onward = replace(carried, own=(*carried.own, ~reserved))
        return _followed(layers, start, here + 1, onward, non_negative)
    weight, source = dense_weight(module), copied_channels(module)
    stride = carried.stride * module.stride[0]
    again = (source >= 0) & reserved[source]
    if again.any() and not again.all() and not (weight[~again][:, reserved] != 0).any():
        onward = _Carried(again, carried.source[source], (*carried.own, ~again), stride)
        span = _followed(layers, start, here + 1, onward, non_negative)
        if span is not None:
            return span
    first = layers[start][1]
    assert isinstance(first, nn.Conv2d)
    shortcut = _merged(module, weight, carried, first.in_channels)
    return None if shortcut is None else Span(start, here + 1, carried.own, shortcut, stride)


def _merged(conv: nn.Conv2d, weight: Tensor, carried: _Carried, inputs: int) -> Tensor | None:
    """The matrix ``(out, in)`` that a convolution applies to copied channels, if it is one."""
    columns = weight[:, carried.reserved]
    only_centre = torch.count_nonzero(columns) == torch.count_nonzero(_centre(columns))
    has_own = (weight[:, ~carried.reserved] != 0).any()
    if not only_centre or not has_own or not _keeps_size(conv):
        return None
    matrix = weight.new_zeros(len(weight), inputs)
    return matrix.index_add(1, carried.source[carried.reserved], _centre(columns))


def _passes(module: nn.Module, reserved: Tensor, non_negative: bool) -> bool:
    """Whether a layer passes the reserved channels unchanged, and is known here."""
    match module:
        case nn.PReLU():
            slopes = module.weight.detach().expand(len(reserved))[reserved]
            return non_negative or bool((slopes == 1).all())
        case PartialActivation():
            idle = not module.acts[reserved].any()
            return idle or (non_negative and module.activation == "relu")
        case _:
            return isinstance(module, SILENT) or (non_negative and isinstance(module, RECTIFIERS))


def _is_non_negative(layers: Layers) -> bool:
    """Whether the output of a list of layers cannot be negative."""
    for _, module in reversed(layers):
        if isinstance(module, nn.ReLU | nn.ReLU6):
            return True
        if not isinstance(module, (*SILENT, *POOLS)):
            return False
    return False


def prepare(layers: Layers) -> Layers:
    """Bring factors of the shortcuts to 1 and channels into the order that additions want.

    Args:
        layers: Without BNs.

    Returns:
        As many layers of the same kinds, which compute the same.
    """
    layers = [(name, copy.deepcopy(module)) for name, module in layers]
    with torch.no_grad():
        for span in find_spans(layers):
            _bring_factors_to_one(layers, span)
        _order_channels(layers, find_spans(layers))
    return layers


def _bring_factors_to_one(layers: Layers, span: Span) -> None:
    """Divide what a span copies by its factors, and give them to the next layer."""
    for place, module in enumerate(layers[span.start : span.stop - 1], span.start):
        if isinstance(module[1], nn.Conv2d):
            weight = dense_weight(module[1])
            source = copied_channels(module[1])
            factor = _centre(weight).gather(1, source.clamp(min=0)[:, None])[:, 0]
            _divide(layers, place, torch.where(span.own[place - span.start], 1, factor))
    span = _same_span(layers, span)
    if _is_homogeneous(layers[span.stop :]):
        alone = (span.shortcut != 0).sum(1) == 1
        factor = span.shortcut.sum(1)
        _divide(layers, span.stop - 1, torch.where(alone & (factor > 0), factor, 1))


def _same_span(layers: Layers, span: Span) -> Span:
    again = _span_at(layers, span.start)
    assert again is not None
    assert again.stop == span.stop
    return again


def _divide(layers: Layers, place: int, factor: Tensor) -> None:
    """Divide a convolution's outputs ``(out,)``, and multiply the next layer's inputs."""
    conv = layers[place][1]
    assert isinstance(conv, nn.Conv2d)
    conv.weight.div_(factor[:, None, None, None])
    if conv.bias is not None:
        conv.bias.div_(factor)
    reader = layers[_reader(layers, place)][1]
    assert isinstance(reader, nn.Conv2d | nn.Linear)
    if isinstance(reader, nn.Conv2d):
        by_group = factor.view(reader.groups, 1, -1)
        rows = by_group.expand(-1, len(reader.weight) // reader.groups, -1).flatten(0, 1)
        reader.weight.mul_(rows[:, :, None, None])
    else:
        reader.weight.view(len(reader.weight), len(factor), -1).mul_(factor[:, None])


def _reader(layers: Layers, place: int) -> int:
    """The layer with weights that reads a layer's output."""
    return next(i for i in range(place + 1, len(layers)) if _has_weights(layers[i][1]))


def _producer(layers: Layers, place: int) -> int | None:
    """The layer with weights that a layer reads, or None if it reads the image."""
    return next((i for i in reversed(range(place)) if _has_weights(layers[i][1])), None)


def _has_weights(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear)


def _is_homogeneous(layers: Layers) -> bool:
    """Whether factors on channels pass the layers up to the next one with weights."""
    passing = (*RECTIFIERS, nn.PReLU, *SILENT, *POOLS, nn.Flatten)
    for _, module in layers:
        if isinstance(module, nn.Conv2d | nn.Linear):
            return True
        if not isinstance(module, passing):
            return False
    return False


def _order_channels(layers: Layers, spans: Sequence[Span]) -> None:
    """Sort the channels of the tensors between spans by what F and S do to them.

    Behind a span: those that F and S make together, those of F, those of S (the order of
    `ResidualBlock`); among each, those with the same fate stand together, so that later spans
    find theirs side by side where that is possible; and among these, copies stand in the
    order of what they copy.
    """
    merges = {span.stop - 1 for span in spans}
    for span, (inputs, outputs) in zip(spans, _keys(layers, spans), strict=True):
        producer = _producer(layers, span.start)
        if producer is not None and producer not in merges:
            _sort(layers, producer, inputs)
        source = (_same_span(layers, span).shortcut != 0).int().argmax(1).tolist()
        _sort(layers, span.stop - 1, list(zip(outputs, source, strict=True)))


def _keys(layers: Layers, spans: Sequence[Span]) -> list[tuple[list[Key], list[Key]]]:
    """For each span, what to sort the channels of its input and of its output by."""
    starts = {span.start for span in spans}
    fates: list[Key] = []
    keys: list[tuple[list[Key], list[Key]]] = []
    for span in reversed(spans):
        if _reader(layers, span.stop - 1) not in starts:
            fates = [()] * len(span.shortcut)
        outputs: list[Key] = list(zip(kinds_of(layers, span), fates, strict=True))
        targets = [column.nonzero().flatten().tolist() for column in span.shortcut.T]
        fates = [outputs[t[0]] if t else (len(KINDS),) for t in targets]
        keys.append((fates, outputs))
    return keys[::-1]


def _sort(layers: Layers, place: int, keys: Sequence[Key]) -> None:
    """Sort a convolution's output channels by keys, if all layers up to their reader let that."""
    conv, there = layers[place][1], _reader(layers, place)
    reader = layers[there][1]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(reader, nn.Conv2d | nn.Linear)
    slopes = [m.num_parameters for _, m in layers[place:there] if isinstance(m, nn.PReLU)]
    grouped = conv.groups > 1 or (isinstance(reader, nn.Conv2d) and reader.groups > 1)
    if grouped or any(n > 1 for n in slopes) or not _is_homogeneous(layers[place + 1 :]):
        return
    order = sorted(range(len(keys)), key=keys.__getitem__)
    conv.weight.copy_(conv.weight[order])
    if conv.bias is not None:
        conv.bias.copy_(conv.bias[order])
    columns = reader.weight.view(len(reader.weight), len(order), -1)
    columns.copy_(columns[:, order])


def kinds_of(layers: Layers, span: Span) -> list[int]:
    """Which of `KINDS` each output channel of a span is."""
    merge = layers[span.stop - 1][1]
    assert isinstance(merge, nn.Conv2d)
    of_body = (dense_weight(merge)[:, span.own[-1]] != 0).flatten(1).any(1)
    of_shortcut = (span.shortcut != 0).any(1)
    return torch.where(of_shortcut, torch.where(of_body, 0, 2), 1).tolist()


def blocks_of(layers: Layers, span: Span) -> dict[Form, Layers]:
    """A span in every form that it can have.

    Args:
        layers: As `prepare` leaves them.
        span: One of theirs.

    Returns:
        ``"plain"``: as it is. ``"selection"``: S takes channels of x, where none becomes two
        or is added to another. ``"convolution"``: S is a 1×1 convolution. The form that is
        mostly the fastest comes first: backends merge a convolution with the addition behind
        it, but not slices and concatenations.
    """
    name = f"{layers[span.start][0]}_block"
    every = torch.arange(len(span.shortcut))
    body = _body(layers, span, every)
    conv = pointwise(span.shortcut[:, :, None, None], None, (span.stride, span.stride))
    forms: dict[Form, Layers] = {
        "convolution": [(name, ResidualBlock(body, conv, None))],
        "plain": layers[span.start : span.stop],
    }
    kinds = kinds_of(layers, span)
    if not span.is_selection or kinds != sorted(kinds):
        return forms
    by_selection: Layers = [(name, _by_selection(layers, span, torch.tensor(kinds)))]
    if torch.equal(span.shortcut.cpu(), torch.eye(*span.shortcut.shape).to(span.shortcut.cpu())):
        return {"selection": by_selection, **forms}
    return {**forms, "selection": by_selection}


def _body(layers: Layers, span: Span, outputs: Tensor) -> nn.Sequential:
    """F with the given output channels."""
    body: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = torch.arange(span.shortcut.shape[1])
    rows = [*_own_rows(layers, span), outputs]
    for (name, module), here in zip(layers[span.start : span.stop], rows, strict=True):
        if isinstance(module, nn.Conv2d):
            body[name] = _cut(module, here, inputs)
        else:
            layer = copy.deepcopy(module)
            if isinstance(layer, PartialActivation):
                layer.keep(here)
            elif isinstance(layer, nn.PReLU) and layer.num_parameters > 1:
                layer.weight = nn.Parameter(layer.weight.detach()[here])
                layer.num_parameters = len(here)
            body[name] = layer
        inputs = here
    return nn.Sequential(body)


def _own_rows(layers: Layers, span: Span) -> list[Tensor]:
    """F's channels behind each of its layers but the last, without zeros that only fill groups."""
    rows = []
    for place, own in enumerate(span.own, span.start):
        reader = layers[_reader(layers, place)][1]
        assert isinstance(reader, nn.Conv2d)
        read = own & (dense_weight(reader) != 0).flatten(2).any(2).any(0)
        rows.append((read if read.any() else own).nonzero().flatten())
    return rows


def _cut(conv: nn.Conv2d, outputs: Tensor, inputs: Tensor) -> nn.Conv2d:
    """A convolution of some input channels to some output channels, in groups if it can be."""
    weight = dense_weight(conv)[outputs][:, inputs]
    bias = None if conv.bias is None else conv.bias.detach()[outputs]
    groups = _groups(weight) if conv.groups > 1 else 1
    every = torch.arange(groups)
    return with_weights(
        conv, _by_group(weight, groups)[every, :, every].flatten(0, 1), bias, groups
    )


def _by_group(weight: Tensor, groups: int) -> Tensor:
    """``(out, in, …)`` as ``(groups, out / groups, groups, in / groups, …)``."""
    outputs, inputs, *size = weight.shape
    return weight.reshape(groups, outputs // groups, groups, inputs // groups, *size)


def _groups(weight: Tensor) -> int:
    """The largest number of groups that a dense ``(out, in, k, k)`` weight falls into."""
    used = (weight != 0).flatten(2).any(2)
    most = math.gcd(*used.shape)
    for groups in (n for n in range(most, 1, -1) if most % n == 0):
        by_group = _by_group(used, groups)
        across = by_group.any(3).any(1) & ~torch.eye(groups, dtype=torch.bool, device=used.device)
        if not across.any():
            return groups
    return 1


def _by_selection(layers: Layers, span: Span, kinds: Tensor) -> ResidualBlock:
    merge = layers[span.stop - 1][1]
    assert isinstance(merge, nn.Conv2d)
    body = _body(layers, span, torch.nonzero(kinds < 2).flatten())
    no_bias = span.shortcut.new_zeros(len(kinds))
    bias = no_bias if merge.bias is None else merge.bias.detach()
    added = _selection(span, torch.nonzero(kinds == 0).flatten(), no_bias)
    return ResidualBlock(body, added, _selection(span, torch.nonzero(kinds == 2).flatten(), bias))


def _selection(span: Span, outputs: Tensor, bias: Tensor) -> ChannelSelection | None:
    """The given outputs of S, with a bias where that is not 0."""
    if not len(outputs):
        return None
    rows, bias = span.shortcut[outputs], bias[outputs]
    source, scale = (rows != 0).int().argmax(1), rows.sum(1)
    scaled, shifted = bool((scale != 1).any()), bool(bias.any())
    selection = ChannelSelection(rows.shape[1], source.tolist(), span.stride, scaled, shifted)
    if scaled:
        selection.scale = nn.Parameter(scale.clone())
    if shifted:
        selection.bias = nn.Parameter(bias.clone())
    return selection.to(rows)


Choose = Callable[[str, Sequence[Form], Callable[[Form], PlainNet]], Form]


def lower(net: PlainNet, example_input: Tensor, choose: Choose | None = None) -> PlainNet:
    """Give every span of a plain net the form that is chosen for it.

    Args:
        net: In evaluation mode; left as it is. Its BNs are folded.
        example_input: ``(N, C, H, W)``, on the net's device and of its dtype.
        choose: Takes the name of a span's first layer, the forms that it can have, the
            likeliest first, and what makes the whole net with one of them; returns the form
            to take. It is asked about one span after the other; those that are still open
            have their likeliest. By default what is `fastest` with torch for one image.

    Returns:
        A net with the same outputs, compared in float64. Where an addition was chosen, a
        `ResidualBlock` stands in the list of layers; ``info["lowering"]`` tells the form of
        every span by its first layer's name.

    Raises:
        ConversionError: The outputs differ by more than 1e-9 of their magnitude.
    """
    choose = choose or fastest(example_input, ONE_IMAGE)
    exact = fold_bn(net).double()
    layers = prepare(list(exact.named_children()))
    spans = {layers[span.start][0]: span for span in find_spans(layers)}
    blocks = {name: blocks_of(layers, span) for name, span in spans.items()}
    chosen = {name: next(iter(forms)) for name, forms in blocks.items()}

    def made(form_of: Mapping[str, Form]) -> PlainNet:
        lowered: Layers = []
        widths, done = dict(net.widths), 0
        for name, span in spans.items():
            block = blocks[name][form_of[name]]
            lowered += [*layers[done : span.start], *block]
            done = span.stop
            for _, module in block:
                widths |= _widths(module)
        lowered += layers[done:]
        result = net.with_layers(OrderedDict(copy.deepcopy(lowered)), widths).eval()
        result.info = {**net.info, "lowering": dict(form_of)}
        return result

    for name, forms in blocks.items():
        chosen[name] = choose(
            name,
            list(forms),
            lambda form, name=name: made({**chosen, name: form}).to(example_input),  # type: ignore[misc]
        )
    result = made(chosen)
    with torch.no_grad():
        expected, found = (model(example_input.double()) for model in (exact, result))
    check_equal(expected, found, "the lowered net")
    return result.to(example_input)


def _widths(block: nn.Module) -> dict[str, Width]:
    """A block with an addition reserves nothing: all channels are its own."""
    if not isinstance(block, ResidualBlock):
        return {}
    convs = ((n, m) for n, m in block.body.named_children() if isinstance(m, nn.Conv2d))
    return {name: Width(conv.out_channels) for name, conv in convs}


def likeliest(_: str, forms: Sequence[Form], __: Callable[[Form], PlainNet]) -> Form:
    """Choose without measuring; see `blocks_of`."""
    return forms[0]


def fastest(
    example_input: Tensor, platform: Platform, rounds: int = 9, min_seconds: float = 0.02
) -> Choose:
    """Choose what a platform runs fastest, each form timed in the whole net; see `lower`.

    A block by itself tells little: what it costs to bring its channels into another memory
    layout, or which operations the backend merges, depends on its neighbours. Another form
    than the likeliest must be faster in three of four rounds: a disturbance of the machine
    shall not decide.
    """

    def choose(_: str, forms: Sequence[Form], made: Callable[[Form], PlainNet]) -> Form:
        nets: dict[str, nn.Module] = {form: made(form) for form in forms}
        timings = time_deployed(
            nets, example_input, platform, rounds=rounds, min_seconds=min_seconds, warn=False
        )

        def slowness(form: Form) -> float:
            pairs = zip(timings[form].samples_ms, timings[forms[0]].samples_ms, strict=True)
            ratios = sorted(mine / likeliest for mine, likeliest in pairs)
            return ratios[math.ceil(0.75 * len(ratios)) - 1]

        return min(forms, key=slowness)

    return choose
