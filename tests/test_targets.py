"""Budgets: what they may be, and the search that meets them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmprune.errors import PruningError, UsageError
from rmprune.importance import by_scale
from rmprune.models import create_model
from rmprune.slimming import add_shortcut_bn, scale_parameters
from rmprune.targets import Target, search, thresholds_of


def test_targets_are_read_and_written():
    assert Target.parse("macs=0.3") == Target("macs", 0.3)
    assert str(Target.parse("accuracy-drop=0.50")) == "accuracy-drop=0.5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("macs", "a target is KIND=VALUE"),
        ("macs=half", "a target is KIND=VALUE"),
        ("flops=0.5", "unknown target 'flops'; known: latency, macs, params, accuracy-drop"),
        ("macs=1.5", r"between 0 and 1 \(a share of the original model\), but it is 1.5"),
        ("latency=0", "between 0 and 1"),
        ("params=nan", "between 0 and 1"),
        ("accuracy-drop=-1", r"between 0 and 100 \(percentage points\)"),
    ],
)
def test_what_is_no_target(text, message):
    with pytest.raises(UsageError, match=message):
        Target.parse(text)


@given(st.floats(0.05, 0.9), st.integers(2, 5))
def test_steps_on_the_way_shrink_by_one_factor(value, steps):
    target = Target("macs", value)
    shares = [1.0, *(target.after(step / steps).value for step in range(1, steps + 1))]
    factors = [after / before for before, after in itertools.pairwise(shares)]
    assert shares[-1] == pytest.approx(value)
    assert max(factors) == pytest.approx(min(factors))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=60), st.floats(0.02, 1))
def test_the_search_keeps_as_much_as_the_limit_allows(steps, limit):
    """A net that shrinks with every threshold: against trying them all."""
    values = sorted([step / sum(steps) for step in steps], reverse=True)
    costs = [sum(values[i:]) for i in range(len(values) + 1)]
    tried = []

    def attempt(threshold):
        tried.append(threshold)
        return int(threshold)

    found, above = search(range(len(costs)), attempt, costs.__getitem__, limit, tolerance=0.03)

    best = next(i for i, cost in enumerate(costs) if cost <= limit)
    assert costs[found] <= limit
    assert found == best or costs[found] >= 0.97 * limit
    if above is not None:
        assert costs[above] > limit
        assert above == found - 1
    assert len(tried) <= len(costs).bit_length() + 1


def test_budgets_that_nothing_meets():
    with pytest.raises(PruningError, match=r"keeps more than 10\.0% of the original"):
        search([0.0, 1.0], lambda t: t, lambda _: 0.5, 0.1, 0.03)


def test_thresholds_leave_out_what_must_stay():
    slim = add_shortcut_bn(create_model("resnet20"))
    names = list(scale_parameters(slim))
    scale_parameters(slim)[names[0]].data.fill_(3.0)
    savings = {name: float(name == names[0]) * 2 for name in names}
    assert thresholds_of(by_scale(slim, savings)) == [0.0, 1.5, 4.0]
