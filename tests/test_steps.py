import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rmprune.graph import GlobalMean, trace
from rmprune.models import create_model
from rmprune.steps import Addition, Concatenation, Gate, Reshape, Scaling, Slice, Unknown, read
from rmprune.steps import blocks as blocks_of


class Net(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.eca = nn.Conv1d(1, 1, 3, padding=1)
        self.gamma = nn.Parameter(torch.randn(4, 1, 1))
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


def ops(compute):
    return [type(step.op) for step in read(trace(Net(compute).eval())).steps]


def batch_norm(m, x):
    return F.batch_norm(x, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias)


def se(m, x):
    return x * torch.sigmoid(m.other(F.relu(m.other(x.mean((2, 3), keepdim=True)))))


def eca(m, x):
    gate = m.eca(x.mean((2, 3)).view(x.shape[0], 1, -1)).view(x.shape[0], -1, 1, 1).sigmoid()
    return x * gate.expand_as(x)


READINGS = {
    "sum": (lambda m, x: m.conv(x) + x, [nn.Conv2d, Addition]),
    "sum in place": (lambda m, x: m.conv(x).add_(x), [nn.Conv2d, Addition]),
    "functions": (lambda m, x: F.silu(batch_norm(m, x)), [nn.BatchNorm2d, nn.SiLU]),
    "weights": (lambda m, x: F.conv2d(x, m.conv.weight, None, 2, 1), [nn.Conv2d]),
    "layer scale": (lambda m, x: m.gamma * x, [Scaling]),
    "constants": (lambda _, x: (x - 0.5) / 2 + 1, [Scaling] * 3),
    "mean": (lambda m, x: m.fc(x.mean([2, 3])), [GlobalMean, nn.Linear]),
    "flattening": (lambda m, x: m.fc(x.view(x.shape[0], -1)), [nn.Flatten, nn.Linear]),
    "chunks": (lambda _, x: torch.cat(x.chunk(2, 1)[::-1], 1), None),
    "split": (
        lambda _, x: torch.cat([x.split([1, 3], 1)[1], x.split(2, dim=1)[-1]], 1),
        [Slice, Slice, Concatenation],
    ),
    "slice": (lambda _, x: x[:, 1:3], [Slice]),
    "gate": (se, [Gate]),
    "gate of one convolution along the channels": (eca, [Gate]),
    "dropout": (lambda m, x: F.dropout(m.conv(x), 0.5, m.training), [nn.Conv2d]),
    "a product": (lambda m, x: m.conv(x) * x, [nn.Conv2d, Unknown]),
    "rows": (lambda _, x: torch.cat([x, x], 2), [Unknown]),
    "view": (lambda _, x: x.view(-1, 2, 2), [Reshape]),
    "a dead branch": (lambda m, x: (m.other(x), m.conv(x))[1], [nn.Conv2d]),
}


@pytest.mark.parametrize("case", [case for case in READINGS if READINGS[case][1]])
def test_every_spelling_is_read(case):
    compute, expected = READINGS[case]
    assert ops(compute) == expected


def test_slices_know_their_channels():
    def compute(_, x):
        first, second = x.chunk(2, dim=1)
        return torch.cat([second, first, x[:, ::2]], 1)

    slices = [step.op for step in read(trace(Net(compute))).steps if isinstance(step.op, Slice)]
    found = {tuple(op.indices(5)) for op in slices}
    assert found == {(0, 1, 2), (3, 4), (0, 2, 4)}


def test_scalings_hold_the_constants():
    steps = read(trace(Net(lambda m, x: 3 - x * m.gamma))).steps
    assert torch.equal(steps[0].op.factor, steps[0].op.factor.flatten())
    assert steps[1].op == Scaling(torch.tensor(-1), torch.tensor(3))


@pytest.mark.parametrize("compute", [se, eca])
def test_gates_compute_what_they_were_read_from(compute):
    model = Net(compute).double().eval()
    (step,) = read(trace(model)).steps
    x = torch.randn(2, 4, 5, 5).double()
    torch.testing.assert_close(step.op.layer(4)(x), model(x))


def test_readers_see_what_was_written_in_place():
    def compute(m, x):
        y = m.conv(x)
        F.relu(y, inplace=True)
        return y + m.other(y)

    steps = {step.name: step for step in read(trace(Net(compute))).steps}
    assert steps["other"].inputs == (steps["relu"].node,)
    assert steps["add"].inputs[0] == steps["relu"].node


def test_blocks_are_told_by_their_additions():
    found = blocks_of(read(trace(create_model("resnet20"))))
    assert len(found) == 9
    assert found[0] == ("layer1.0.conv1", "layer1.0.conv2")
