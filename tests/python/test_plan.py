"""Plans against a plain numpy reference: what a round does is a matrix."""

import pickle
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dssync_pg import Plan

world_sizes = st.integers(1, 40)


def matrices(plan):
    """W_1 ... W_P: in each round every member of a group takes the mean of the group."""
    for groups in plan.rounds:
        matrix = np.zeros((plan.world_size, plan.world_size))
        for group in groups:
            matrix[np.ix_(group, group)] = 1 / len(group)
        yield matrix


def rho(rounds, world_size):
    product = np.eye(world_size)
    for groups in rounds:
        matrix = np.zeros((world_size, world_size))
        for group in groups:
            matrix[np.ix_(group, group)] = 1 / len(group)
        product = matrix @ product
    return np.linalg.norm(product - 1 / world_size, 2)


def made(draw_kind, world_size, group_size, max_period, seed):
    """The plan, or None where the core says that there is none of that shape."""
    try:
        return Plan.create(world_size, draw_kind, group_size, max_period, seed)
    except ValueError:
        return None


any_plan = st.builds(
    made,
    st.sampled_from(["auto", "grid", "random"]),
    world_sizes,
    st.just("auto") | st.integers(2, 12),
    st.integers(1, 12),
    st.integers(0, 2**64 - 1),
).filter(lambda plan: plan is not None)


@given(any_plan)
def test_each_round_divides_all_ranks(plan):
    for index, groups in enumerate(plan.rounds):
        assert sorted(rank for group in groups for rank in group) == list(range(plan.world_size))
        for group in groups:
            assert group == sorted(group)
            for rank in group:
                assert plan.group(index, rank) == group
    assert plan.max_group_size == max(len(group) for groups in plan.rounds for group in groups)


@given(any_plan)
def test_contraction_is_that_of_the_matrices(plan):
    assert plan.contraction == pytest.approx(rho(plan.rounds, plan.world_size), abs=1e-6)
    assert plan.contraction < 1


@given(any_plan, st.integers(0, 2**32))
def test_each_round_keeps_the_mean(plan, seed):
    values = np.random.default_rng(seed).normal(size=plan.world_size)
    for matrix in matrices(plan):
        assert (matrix @ values).mean() == pytest.approx(values.mean(), abs=1e-12)


@given(any_plan, st.integers(0, 2**40), st.integers(0, 2**20))
def test_the_round_advances_with_step_and_stripe(plan, step, stripe):
    assert plan.round_at(step, stripe) == (step + stripe) % plan.period


@given(any_plan, st.integers(0, 1000))
def test_calls_outside_a_step_use_every_round_once_a_block(plan, block):
    period = plan.period
    assert sorted(plan.core.round_of_call(block * period + i) for i in range(period)) == list(range(period))


@given(any_plan)
def test_bytes_pickles_and_equality(plan):
    for same in (Plan.from_bytes(plan.to_bytes()), pickle.loads(pickle.dumps(plan))):
        assert same == plan
        assert hash(same) == hash(plan)
        assert same.rounds == plan.rounds
        assert (same.kind, same.seed) == (plan.kind, plan.seed)
    assert plan != Plan.from_rounds(plan.rounds, seed=plan.seed ^ 1)


@given(any_plan, st.data())
def test_damaged_bytes_are_refused(plan, data):
    good = plan.to_bytes()
    where = data.draw(st.integers(0, len(good) - 1))
    flipped = bytearray(good)
    flipped[where] ^= data.draw(st.integers(1, 255))
    for bad in (bytes(flipped), good[:where], good + b"x"):
        with pytest.raises(ValueError, match=r".+"):
            Plan.from_bytes(bad)


@st.composite
def partitions(draw):
    """(world size, rounds) with groups by chance: some mix all ranks and some do not."""
    world_size = draw(st.integers(1, 10))
    rounds = []
    for _ in range(draw(st.integers(1, 3))):
        labels = draw(st.lists(st.integers(0, world_size - 1), min_size=world_size, max_size=world_size))
        rounds.append([[rank for rank in range(world_size) if labels[rank] == label] for label in sorted(set(labels))])
    return world_size, rounds


@settings(max_examples=300)
@given(partitions())
def test_the_gate_refuses_exactly_what_never_mixes(case):
    world_size, rounds = case
    if rho(rounds, world_size) < 1 - 1e-9:
        plan = Plan.from_rounds(rounds)
        assert [sorted(groups) for groups in plan.rounds] == [sorted(groups) for groups in rounds]
        assert plan.kind == "explicit"
    else:
        with pytest.raises(ValueError, match=r"(?i)mix|connect"):
            Plan.from_rounds(rounds)


@pytest.mark.parametrize(
    "rounds",
    [
        [],
        [[]],
        [[[]]],
        [[[0, 1], [1, 2]]],
        [[[0, 1], [3]]],
        [[[0, 1]], [[0, 1, 2]]],
        [[[0, 0, 1]]],
        [[[0, -1]]],
    ],
)
def test_what_is_no_partition_is_refused(rounds):
    with pytest.raises((ValueError, TypeError), match=r".+"):
        Plan.from_rounds(rounds)


@pytest.mark.parametrize("factors", [(2, 2), (2, 2, 2), (3, 3), (2, 3), (5, 5), (4, 8), (2, 2, 3)])
def test_grid_reaches_exact_consensus_every_period(factors):
    world_size = prod(factors)
    plan = Plan.create(world_size, "grid", max(factors))
    product = np.eye(world_size)
    for matrix in matrices(plan):
        product = matrix @ product
    np.testing.assert_allclose(product, np.full((world_size, world_size), 1 / world_size), atol=1e-12)
    assert plan.contraction == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("world_size", "largest", "period"), [(4, 2, 2), (8, 2, 3), (27, 3, 3), (32, 4, 3), (64, 4, 3)])
def test_auto_takes_pairs_while_three_rounds_suffice(world_size, largest, period):
    plan = Plan.create(world_size)
    assert (plan.kind, plan.max_group_size, plan.period) == ("grid", largest, period)


@pytest.mark.parametrize("world_size", [7, 13, 97])
def test_prime_world_sizes_mix_by_unequal_groups(world_size):
    plan = Plan.create(world_size)
    assert plan.kind == "random"
    assert 0 < plan.contraction < 1
    assert plan == Plan.create(world_size)
    assert plan != Plan.create(world_size, seed=1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"world_size": 0}, "world"),
        ({"world_size": 8, "plan": "striped"}, "striped"),
        ({"world_size": 7, "plan": "grid", "group_size": 2}, "7"),
        ({"world_size": 4, "group_size": 8}, "8"),
        ({"world_size": 8, "max_period": 5000}, "5000"),
    ],
)
def test_impossible_plans_are_refused_with_the_value(arguments, text):
    with pytest.raises(ValueError, match=text):
        Plan.create(**arguments)


def test_a_plan_prints_as_a_table():
    assert str(Plan.from_rounds([[[0, 1], [2, 3]], [[0, 3], [1, 2]]])) == (
        "4 ranks, explicit plan, period 2, groups of up to 2, contraction 0\n  round 0: {0 1} {2 3}\n  round 1: {0 3} {1 2}"
    )
    assert repr(Plan.create(1)) == "<Plan of 1 ranks: grid plan, period 1, groups of up to 1, contraction 0>"
    large = str(Plan.create(4096)).splitlines()
    assert all(len(line) < 160 for line in large)
    assert " more groups" in large[1]


def test_a_plan_cannot_be_changed():
    with pytest.raises(AttributeError, match="cannot be changed"):
        Plan.create(4).core = None
