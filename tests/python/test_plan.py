"""Plans against a plain numpy reference: what a round does is a matrix, and what a delayed crossing does is written out."""

import dataclasses
import pickle
import re
from math import isnan, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dssync_pg import Plan, Topology
from dssync_pg.topology import Host, Rack

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


@pytest.mark.parametrize("rank", [-1, 2**32 - 1, 2**64, 0.0, "0", None])
def test_ranks_that_are_none_are_refused(rank):
    with pytest.raises(ValueError, match=rf"a rank of round 1 is {re.escape(repr(rank))}, expected an integer from 0 to"):
        Plan.from_rounds([[[0, 1]], [[0, 1, rank]]])


def test_rounds_may_be_generators():
    rounds = [[[0, 1], [2, 3]], [[0, 3], [1, 2]]]
    assert Plan.from_rounds(((member for member in group) for group in groups) for groups in rounds).rounds == rounds


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("world_size", 0),
        ("world_size", 2.0),
        ("group_size", -1),
        ("group_size", "many"),
        ("max_period", -1),
        ("max_period", 0),
        ("max_period", 1 << 40),
        ("delay", -1),
        ("delay", 1.5),
        ("seed", -1),
        ("model_bytes", -1),
        ("compute_s", -1.0),
        ("compute_s", float("nan")),
    ],
)
def test_parameters_that_cannot_be_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {re.escape(repr(value))}, expected"):
        Plan.create(**{"world_size": 8, name: value})


def test_no_bytes_are_not_the_default():
    assert Plan.create(topology=BED, model_bytes=0) == Plan.create(topology=BED, model_bytes=1) != Plan.create(topology=BED)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1 << 20, "so small a model is one stripe, which crosses in 1 of 6 steps"),
        (3 << 20, "of the 3 stripes of a step one crosses in 3 of 6 steps"),
        (32 << 20, "of the 6 stripes of a step one crosses;"),
    ],
)
def test_stripes_that_cross(size, text):
    assert text in Plan.create(plan="striped", topology=BED, model_bytes=size).explain(BED, size)


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
        ({"world_size": 8, "plan": "striped"}, "striped plan is made around racks and needs a topology"),
        ({"world_size": 8, "plan": "stripes"}, "stripes"),
        ({}, "a world_size or a topology"),
        ({"topology": Topology.flat(4), "plan": "leaders"}, "at least 2 racks"),
        ({"topology": Topology.flat(4), "world_size": 5}, "holds 4 workers, but world_size is 5"),
        ({"topology": Topology.uniform(2, 2), "plan": "striped", "delay": 8}, "delay is 8"),
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


# ---- around racks ---------------------------------------------------------------------------------------------------------------


def racks_of(sizes, nic="500 Mbit/s", uplink="100 Mbit/s"):
    """One worker a host, ranks dealt out so that those of a rack are not in a row."""
    left = list(sizes)
    ranks = [[] for _ in sizes]
    for rank in range(sum(sizes)):
        rack = max((r for r in range(len(sizes)) if left[r]), key=lambda r: (left[r], r))
        left[rack] -= 1
        ranks[rack].append(rank)
    bare = Topology(Rack(f"rack{r}", tuple(Host(f"host{rank}", (rank,)) for rank in members)) for r, members in enumerate(ranks))
    return bare.with_links(nic, uplink)


BED = Topology.uniform(2, 4, nic="500 Mbit/s", uplink="100 Mbit/s")

rack_sizes = st.lists(st.integers(1, 5), min_size=2, max_size=5) | st.builds(
    lambda r, w: [w] * r, st.integers(2, 6), st.integers(1, 4)
)


@st.composite
def racked_plans(draw, kinds=("leaders", "striped", "hybrid")):
    kind = draw(st.sampled_from(kinds))
    topology = racks_of(draw(rack_sizes))
    max_period = draw(st.integers(3, 9))
    delay = draw(st.just("auto") | st.integers(0, max_period - 1))
    return Plan.create(None, kind, "auto", max_period, draw(st.integers(0, 99)), topology=topology, delay=delay)


class Replicas:
    """One number a stripe on every worker, averaged step by step as the plan says.

    Crossings by their definition: `delay` steps later every worker of a rack adds what the rack's mean lacked of the group's.
    Until then workers keep their values, or all of the rack take its mean at once.
    """

    def __init__(self, plan, seed, step):
        self.plan, self.step, self.rounds = plan, step, plan.rounds
        self.random = np.random.default_rng(seed)
        self.values = self.random.normal(size=(plan.stripe_count, plan.world_size))
        self.rack_of = np.array(plan.rack_of)
        self.corrections = []  # (step, stripe, members, what to add)

    def cross(self, stripe, index, group):
        values = self.values[stripe]
        group_mean = values[group].mean()
        for rack in np.unique(self.rack_of[group]):
            members = np.flatnonzero(self.rack_of == rack)
            rack_mean = values[members].mean()
            if not self.plan.keeps_values(index):
                values[members] = rack_mean
            self.corrections.append((self.step + self.plan.delay, stripe, members, group_mean - rack_mean))

    def average(self):
        for stripe in range(self.plan.stripe_count):
            index = self.plan.round_at(self.step, stripe)
            for group in self.rounds[index]:
                if self.plan.is_crossing(index):
                    self.cross(stripe, index, group)
                else:
                    self.values[stripe, group] = self.values[stripe, group].mean()
        for due, stripe, members, lacking in self.corrections:
            if due == self.step:
                self.values[stripe, members] += lacking
        self.corrections = [correction for correction in self.corrections if correction[0] > self.step]
        self.step += 1

    def spread(self):
        return np.ptp(self.values, axis=1)


@settings(deadline=None)
@given(racked_plans(("striped", "hybrid")), st.integers(0, 2**32), st.integers(0, 100))
def test_every_parameter_is_averaged_over_all_workers_in_time(plan, seed, first_step):
    """With equal racks and unequal ones, waited for or delayed: whenever one begins, after the longest wait all hold the mean."""
    replicas = Replicas(plan, seed, first_step)
    means = replicas.values.mean(axis=1)
    waits = np.zeros(plan.stripe_count, dtype=int)
    for elapsed in range(1, plan.longest_wait + 1):
        replicas.average()
        waits[(waits == 0) & (replicas.spread() < 1e-12)] = elapsed
    np.testing.assert_allclose(replicas.values, np.repeat(means[:, None], plan.world_size, axis=1), atol=1e-12)
    assert (waits > 0).all()
    assert plan.longest_wait <= plan.period + plan.delay


def test_the_bound_of_eight_steps_and_the_delay_holds_and_is_reached():
    for uplink in ("20 Mbit/s", "100 Mbit/s", "400 Mbit/s"):
        for delay in ("auto", 0, 3):
            topology = BED.with_links(uplinks=uplink)
            plan = Plan.create(topology=topology, plan="striped", delay=delay)
            assert plan.longest_wait <= 8 + plan.delay
            latest = 0
            for first_step in range(plan.period):
                replicas = Replicas(plan, 1, first_step)
                while (replicas.spread() > 1e-12).any():
                    replicas.average()
                latest = max(latest, replicas.step - first_step)
            assert latest == plan.longest_wait


@settings(deadline=None)
@given(racked_plans(), st.integers(0, 2**32))
def test_averages_keep_the_mean_while_workers_move(plan, seed):
    """At every step, corrections under way or not: they sum to zero over the workers."""
    replicas = Replicas(plan, seed, 0)
    means = replicas.values.mean(axis=1)
    for _ in range(3 * plan.period):
        moves = replicas.random.normal(size=replicas.values.shape)
        replicas.values += moves
        means += moves.mean(axis=1)
        replicas.average()
        np.testing.assert_allclose(replicas.values.mean(axis=1), means, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(racked_plans(("striped",)), st.integers(0, 2**32))
def test_delayed_crossings_keep_moving_workers_together(plan, seed):
    """The distance to the mean stays bounded: a correction that counted something twice would make it grow without end."""
    replicas = Replicas(plan, seed, 0)
    distances = []
    for _ in range(30 * plan.period):
        replicas.values += replicas.random.normal(size=replicas.values.shape)
        replicas.average()
        distances.append(np.sqrt(np.mean(np.var(replicas.values, axis=1))))
    late = np.mean(distances[len(distances) // 2 :])
    assert late < 3 * np.sqrt(plan.longest_wait + 1)


@given(racked_plans())
def test_workers_keep_their_values_where_rounds_between_crossings_bring_each_rack_together(plan):
    racks = np.equal.outer(plan.rack_of, plan.rack_of)
    inside, together, crossings = np.eye(plan.world_size), True, []
    for index, matrix in enumerate(matrices(plan)):
        if plan.is_crossing(index):
            together &= np.allclose(inside, racks / racks.sum(axis=0), atol=1e-12)
            inside = np.eye(plan.world_size)
            crossings.append(index)
        else:
            inside = matrix @ inside
    kept = together and plan.kind == "striped" and plan.delay > 0
    assert [index for index in range(plan.period) if plan.keeps_values(index)] == (crossings if kept else [])


@pytest.mark.parametrize(
    ("sizes", "kept", "parameters"),
    [
        ((2, 2), True, {}),
        ((1, 3), True, {}),
        ((2, 3), True, {}),
        ((4, 4, 4, 4), True, {}),
        ((2, 3), False, {"delay": 0}),  # a delay of 0: an exact average over all racks
        ((2, 3), False, {"plan": "hybrid"}),  # nobody averages between crossings
        ((4, 4), False, {"max_period": 2, "delay": 1}),  # one round inside racks is not enough for 4
        ((1, 5), False, {}),  # a prime one: its rounds are random
    ],
)
def test_which_plans_keep_values(sizes, kept, parameters):
    plan = Plan.create(**{"plan": "striped", "topology": racks_of(sizes), "delay": 1, **parameters})
    crossings = [index for index in range(plan.period) if plan.is_crossing(index)]
    assert [plan.keeps_values(index) for index in crossings] == [kept] * len(crossings)
    assert str(plan).count("values kept") == (len(crossings) if kept else 0)
    assert ("keep their values" in plan.explain()) == kept


@given(racked_plans())
def test_plans_around_racks_survive_bytes_and_print(plan):
    same = pickle.loads(pickle.dumps(plan))
    assert same == plan
    assert (same.kind, same.stripe_count, same.delay, same.rack_of, same.rounds) == (
        plan.kind,
        plan.stripe_count,
        plan.delay,
        plan.rack_of,
        plan.rounds,
    )
    crossings = [plan.is_crossing(index) for index in range(plan.period)]
    assert [same.is_crossing(index) for index in range(plan.period)] == crossings
    assert [same.keeps_values(index) for index in range(plan.period)] == [plan.keeps_values(index) for index in range(plan.period)]
    assert str(plan).count("across racks") == sum(crossings)
    assert plan.explain().startswith(f"{plan.kind} plan for {plan.world_size} worker")


def test_the_cost_of_the_bed():
    """Against the formulas of csrc/core/cost.c worked out by hand; the core's own tests have the others."""
    wire = 1514 / 1448 * (32 << 20)
    plan = Plan.create(topology=BED)
    cost = plan.cost(BED)
    local, stripes = plan.stripe_count - 1, plan.stripe_count
    assert (plan.kind, plan.rack_of) == ("striped", [0] * 4 + [1] * 4)
    assert cost.foreground_s == pytest.approx(local / stripes * wire / 62.5e6)
    assert cost.background_s == pytest.approx(wire / stripes / 12.5e6)
    assert cost.sync_s == pytest.approx((local + 1.75) / stripes * wire / 62.5e6)
    assert (cost.busiest, cost.longest_wait_steps, cost.contraction) == ("nic", stripes + plan.delay, 0)
    nics, uplinks = plan.link_bytes(BED)
    assert nics == pytest.approx([(local + 1.75) / stripes * wire] * 8)
    assert uplinks == pytest.approx([wire / stripes] * 2)
    assert plan.link_bytes(BED, round=0)[1] == [0, 0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        cost.sync_s = 0
    with pytest.raises(ValueError, match="other racks"):
        plan.cost(racks_of([3, 5]))


def test_why_is_told_beside_what_else_was_weighed():
    plan = Plan.create(topology=BED)
    text = plan.explain(BED)
    wait = f"longest wait for a global average: at most {plan.longest_wait} steps"
    for part in ("striped plan for 8 workers in 2 racks", "busiest link: NIC of host host0", wait):
        assert part in text
    for kind, other in Plan.candidates(BED).items():
        assert other.kind == kind
        assert f"\n    {kind} " in text
    assert "striped has the shortest step" in text
    assert "grid is not what auto would take" in Plan.create(8, "grid").explain(BED)
    flat = Topology.flat(8, nic="1 Gbit/s")
    exact = Plan.create(topology=flat, compute_s=60)
    assert exact.kind == "exact"
    assert "averages everyone each step" in exact.explain(flat, compute_s=60)


def test_auto_is_the_cheapest_candidate_or_nearly():
    for topology in (BED, racks_of([1, 3, 2]), racks_of([2, 2, 2, 2], uplink="2 Gbit/s"), racks_of([6]), racks_of([1, 1, 1])):
        candidates = Plan.candidates(topology)
        plan = Plan.create(topology=topology)
        assert candidates[plan.kind] == plan
        assert plan.cost(topology).sync_s <= 1.05 * min(other.cost(topology).sync_s for other in candidates.values())
    unknown = Topology.uniform(2, 4)
    assert Plan.create(topology=unknown) == Plan.create(8)


def test_contraction_is_left_out_for_many_workers():
    topology = Topology.uniform(2, 2100, nic="10 Gbit/s", uplink="10 Gbit/s")
    plan = Plan.create(topology=topology, plan="striped")
    assert isnan(plan.cost(topology).contraction)
    assert "not computed for so many workers" in plan.explain(topology)
