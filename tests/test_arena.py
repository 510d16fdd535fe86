"""Memory plans: nothing that lives at once overlaps, and little is wasted."""

from hypothesis import given
from hypothesis import strategies as st

from rmprune.arena import Life, peak, plan


@st.composite
def lives(draw):
    count = draw(st.integers(1, 12))
    found = {}
    for number in range(count):
        begin = draw(st.integers(0, 8))
        end = draw(st.integers(begin, 9))
        found[f"t{number}"] = Life(draw(st.integers(1, 100)), begin, end)
    return found


@given(lives(), st.sampled_from([1, 4, 16]))
def test_nothing_overlaps(found, alignment):
    placed = plan(found, alignment)
    for name, life in found.items():
        begin = placed.offsets[name]
        assert begin % alignment == 0
        assert 0 <= begin <= begin + life.bytes <= placed.bytes
        for other, another in found.items():
            if other != name and life.meets(another):
                there = placed.offsets[other]
                assert begin + life.bytes <= there or there + another.bytes <= begin
    assert placed.bytes >= peak(found)
    assert placed.bytes <= sum(life.bytes + alignment for life in found.values())


def test_a_chain_needs_two_places():
    """In a list of layers only a layer's input and output live."""
    chain = {f"x{i}": Life(64 if i % 2 else 32, i, i + 1) for i in range(10)}
    assert plan(chain).bytes == peak(chain) == 96


def test_no_tensors_need_no_memory():
    assert plan({}).bytes == 0
    assert peak({}) == 0
