"""What a channel costs: MACs, parameters or measured time of the layers that it runs through.

A channel that goes takes a row of the convolution that computes it and a column of the one
that reads it. Which convolutions these are depends on the lowering: in a plain net a
reserved channel has rows and columns of its own, in a net with additions it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import pairwise
from typing import Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor, fx, nn

from rmprune.backends import Platform, time_deployed
from rmprune.blocks import channel_guards, split_units
from rmprune.composed import squeezed
from rmprune.convert import convert
from rmprune.errors import UsageError
from rmprune.graph import Block, parse
from rmprune.measure import eval_mode
from rmprune.plain import plain_name
from rmprune.rewrite import with_weights

Cost = Literal["uniform", "macs", "params", "latency"]
Lowering = Literal["plain", "auto"]
LEAST_SHARE = 0.02  # of the mean saving: what measures as free must still be worth switching off


class LayerCost(NamedTuple):
    """What one channel more costs a layer, and what all of it costs."""

    per_output: float
    per_input: float
    whole: float


class Site(NamedTuple):
    """A convolution or linear layer where it stands in a network.

    Attributes:
        layer: The layer.
        input_shape: ``(C, H, W)`` or ``(features,)`` of what it reads.
        positions: Pixels of its output.
    """

    layer: nn.Conv2d | nn.Linear
    input_shape: tuple[int, ...]
    positions: int


def sites(model: nn.Module, example_input: Tensor) -> dict[str, Site]:
    """All convolutions and linear layers by path, in the order in which they run.

    Args:
        model: Any network, on the example input's device.
        example_input: ``(N, C, H, W)``.
    """
    found: dict[str, Site] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def record(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            found[name] = Site(layer, tuple(inputs[0].shape[1:]), output[0, 0].numel())

        return record

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(eval_mode(model))
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                stack.callback(module.register_forward_hook(recorder(name)).remove)
        model(example_input[:1])
    return found


LayerCosts = Callable[[Mapping[str, Site]], dict[str, LayerCost]]


def counted(cost: Cost) -> LayerCosts:
    """Costs of layers by MACs of one image, by parameters, or by channels alone.

    Args:
        cost: ``"macs"``, ``"params"`` or ``"uniform"``: a channel is half its row and half its
            column.
    """

    def costs(layers: Mapping[str, Site]) -> dict[str, LayerCost]:
        result = {}
        for name, (layer, _, positions) in layers.items():
            weight = layer.weight
            inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
            if cost == "uniform":
                result[name] = LayerCost(0.5, 0.5, (len(weight) + inputs) / 2)
                continue
            times = positions if cost == "macs" else 1
            whole = times * weight.numel()
            result[name] = LayerCost(whole / len(weight), whole / inputs, whole)
        return result

    return costs


def measured(table: pd.DataFrame) -> LayerCosts:
    """Costs of layers by the milliseconds of a `latency_table`."""
    known = {
        row["layer"]: LayerCost(row["ms_per_output"], row["ms_per_input"], row["ms"])
        for row in table.to_dict("records")
    }

    def costs(layers: Mapping[str, Site]) -> dict[str, LayerCost]:
        missing = layers.keys() - known.keys()
        if missing:
            raise UsageError(f"the latency table is of another model: it lacks {min(missing)!r}")
        return {name: known[name] for name in layers}

    return costs


def latency_table(
    layers: Mapping[str, Site],
    platform: Platform,
    round_to: int = 1,
    rounds: int = 9,
    min_seconds: float = 0.02,
) -> pd.DataFrame:
    """Measure what a channel more costs each layer on a platform.

    Each layer is timed at its full width, with half its outputs and with half its inputs;
    layers that are alike are timed once.

    Args:
        layers: Of the network; see `sites`.
        platform: Where it shall run.
        round_to: What widths will be multiples of. Halves are rounded down to one; a layer
            without channels takes no time.
        rounds: Samples of each.
        min_seconds: How long a sample lasts at least.

    Returns:
        A row a layer: ``layer``, ``kernel``, ``outputs``, ``inputs``, ``positions``, ``ms``,
        ``ms_half_outputs``, ``ms_half_inputs`` (medians, of a whole batch), and the slopes
        ``ms_per_output`` and ``ms_per_input``, not negative.
    """
    kinds: dict[tuple[object, ...], dict[str, float]] = {}
    rows = []
    for name, site in layers.items():
        layer = site.layer
        outputs = len(layer.weight)
        inputs = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        fewer_outputs, fewer_inputs = (n // 2 // round_to * round_to for n in (outputs, inputs))
        key = (type(layer), tuple(layer.weight.shape), site.input_shape, site.positions)
        if key not in kinds:
            widths = {
                "ms": (outputs, inputs),
                "ms_half_outputs": (fewer_outputs, inputs),
                "ms_half_inputs": (outputs, fewer_inputs),
            }
            kinds[key] = {
                column: _timed(site, *width, platform, rounds, min_seconds)
                for column, width in widths.items()
            }
        timed = kinds[key]
        rows.append(
            {
                "layer": name,
                "kernel": "×".join(map(str, layer.weight.shape[2:])) or "linear",
                "outputs": outputs,
                "inputs": inputs,
                "positions": site.positions,
                **timed,
                "ms_per_output": _slope(timed["ms"], timed["ms_half_outputs"], outputs, round_to),
                "ms_per_input": _slope(timed["ms"], timed["ms_half_inputs"], inputs, round_to),
            }
        )
    return pd.DataFrame(rows)


def _slope(full: float, half: float, channels: int, round_to: int) -> float:
    return max(full - half, 0.0) / (channels - channels // 2 // round_to * round_to)


def _timed(
    site: Site, outputs: int, inputs: int, platform: Platform, rounds: int, min_seconds: float
) -> float:
    """Median milliseconds of a layer of other widths."""
    if not outputs or not inputs:
        return 0.0
    layer = _resized(site.layer, outputs, inputs)
    width = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    timing = time_deployed(
        {"layer": nn.Sequential(layer)},
        torch.zeros(1, width, *site.input_shape[1:]),
        platform,
        rounds=rounds,
        min_seconds=min_seconds,
        warn=False,
    )
    return timing["layer"].median_ms


def _resized(layer: nn.Conv2d | nn.Linear, outputs: int, inputs: int) -> nn.Conv2d | nn.Linear:
    """A layer of the same kind with fewer channels; grouped ones lose groups."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, outputs)
    weight = layer.weight.detach()
    if layer.groups == 1:
        return with_weights(layer, weight[:outputs, :inputs], None, 1)
    share = min(outputs / len(weight), inputs / layer.in_channels)
    groups = max(int(layer.groups * share), 1)
    return with_weights(layer, weight[: len(weight) // layer.groups * groups], None, groups)


def channel_savings(
    slim: fx.GraphModule, example_input: Tensor, layer_costs: LayerCosts, lowering: Lowering
) -> dict[str, float]:
    """What goes when one channel of each BN goes.

    Args:
        slim: A slimmable model in evaluation mode.
        example_input: ``(N, C, H, W)``; its size decides the positions.
        layer_costs: What a layer's channels cost.
        lowering: ``"plain"``: in the plain net, a row and a column for each channel, reserved
            or not. ``"auto"``: in a net with additions. An inner channel has a row and a
            column; the last BN of a block a row, and its shortcut BN nothing by itself; and
            what reads the sum has a column, of which each of the two gets half.

    Returns:
        Path of a BN to its channels' saving, in the unit of the costs.
    """
    if lowering == "plain":
        return _savings_when_plain(slim, example_input, layer_costs)
    costs = layer_costs(sites(squeezed(slim), example_input))
    saved: dict[str, float] = {}
    readers: list[str] = []  # BNs whose channels the next convolution reads
    for item in parse(slim).items:
        if isinstance(item, Block):
            units = split_units(item.body)
            _share(saved, readers, costs[units[0].conv.name].per_input)
            for unit, follower in pairwise(units):
                if unit.bn is not None:
                    saved[unit.bn.name] = (
                        costs[unit.conv.name].per_output + costs[follower.conv.name].per_input
                    )
            bns = [bn.name for bn in item.shortcut if isinstance(bn.module, nn.BatchNorm2d)]
            saved |= dict.fromkeys(bns, 0.0)
            for layer in item.shortcut:
                if isinstance(layer.module, nn.Conv2d):
                    _share(saved, bns[:1], costs[layer.name].per_input)
                    _share(saved, bns[1:], costs[layer.name].per_output)
            last = units[-1].bn
            if last is not None:
                saved[last.name] = costs[units[-1].conv.name].per_output
                readers = [last.name, *bns[-1:]]
        elif isinstance(item.module, nn.Conv2d | nn.Linear):
            _share(saved, readers, costs[item.name].per_input)
            conv, readers = item.name, []
        elif isinstance(item.module, nn.BatchNorm2d):
            saved[item.name] = costs[conv].per_output
            readers = [item.name]
    return saved


def body_savings(
    slim: fx.GraphModule, example_input: Tensor, layer_costs: LayerCosts, lowering: Lowering
) -> dict[str, float]:
    """What goes when the whole body of a block goes: its convolutions.

    That is not the sum of what its channels save one by one, since a convolution's rows and
    columns cross, and since half of a convolution may take nearly as long as all of it.

    Args:
        slim: A slimmable model in evaluation mode.
        example_input: ``(N, C, H, W)``.
        layer_costs: What layers cost.
        lowering: As in `channel_savings`.

    Returns:
        Path of the last convolution of each body to the saving, in the unit of the costs.
    """
    plain = lowering == "plain"
    network = convert(slim, example_input[:1]) if plain else squeezed(slim)
    costs = layer_costs(sites(network, example_input))
    saved = {}
    for block in parse(slim).blocks:
        names = [unit.conv.name for unit in split_units(block.body)]
        own = [plain_name(name) if plain else name for name in names]
        # A body of one convolution can have become one with what stands before it.
        saved[names[-1]] = sum(costs[name].whole for name in own if name in costs)
    return saved


def _share(saved: dict[str, float], bns: list[str], cost: float) -> None:
    for bn in bns:
        saved[bn] += cost / len(bns)


def _savings_when_plain(
    slim: fx.GraphModule, example_input: Tensor, layer_costs: LayerCosts
) -> dict[str, float]:
    plain = convert(slim, example_input[:1])
    costs = layer_costs(sites(plain, example_input))
    guards = {plain_name(name): bns for name, bns in channel_guards(parse(slim)).items()}
    saved: dict[str, float] = {}
    for name, follower in pairwise(costs):
        for bn in guards.get(name, ()):
            saved[bn] = costs[name].per_output + costs[follower].per_input
    return saved


def relative(savings: Mapping[str, float], channels: Mapping[str, int]) -> dict[str, float]:
    """Savings relative to the mean channel's; none is less than 2 % of it.

    Args:
        savings: By BN; BNs that are missing count as the mean.
        channels: Of all BNs.
    """
    known = sum(channels[name] for name in savings)
    mean = sum(saving * channels[name] for name, saving in savings.items()) / known
    shares = {name: max(savings.get(name, mean) / mean, LEAST_SHARE) for name in channels}
    total = sum(shares[name] * channels[name] for name in channels) / sum(channels.values())
    return {name: share / total for name, share in shares.items()}
