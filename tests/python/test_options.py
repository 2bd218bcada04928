"""Options: where a value comes from, and what is said about values and names that cannot be."""

import copy
import dataclasses
import json
import pickle
from datetime import timedelta

import numpy as np
import pytest
import torch.distributed as dist
from harness import rank_store, run_ranks
from hypothesis import assume, given
from hypothesis import strategies as st

from dssync_pg import _agreement
from dssync_pg._agreement import exchange, meeting_place
from dssync_pg.options import Options

DEFAULTS = {
    "group_size": "auto",
    "plan": "auto",
    "topology": "auto",
    "replan_steps": 50,
    "seed": 0,
    "max_period": 8,
    "warmup_steps": 0,
    "average_state": "none",
    "all_reduce": "avg",
    "min_bytes": 1024,
    "auto_attach": True,
    "engine": "auto",
    "transport": "auto",
}
OTHERS = {
    "group_size": ("4", 4),
    "plan": ("random", "random"),
    "topology": ("flat", "flat"),
    "replan_steps": ("never", "never"),
    "seed": ("18446744073709551615", 2**64 - 1),
    "max_period": ("1024", 1024),
    "warmup_steps": ("100", 100),
    "average_state": ("all", "all"),
    "all_reduce": ("exact", "exact"),
    "min_bytes": ("0", 0),
    "auto_attach": ("0", False),
    "engine": ("gloo", "gloo"),
    "transport": ("tcp", "tcp"),
}


def test_defaults():
    assert dataclasses.asdict(Options()) == DEFAULTS


@pytest.mark.parametrize("name", DEFAULTS)
def test_argument_over_environment_over_default(name, monkeypatch):
    text, value = OTHERS[name]
    monkeypatch.setenv(f"DSSYNC_{name.upper()}", text)
    assert getattr(Options(), name) == value
    assert type(getattr(Options(), name)) is type(value)
    assert getattr(Options(**{name: DEFAULTS[name]}), name) == DEFAULTS[name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("group_size", 1),
        ("group_size", 0),
        ("group_size", 2.0),
        ("group_size", True),
        ("group_size", "pairs"),
        ("group_size", "4"),
        ("group_size", 2**24 + 1),
        ("plan", "stripes"),
        ("plan", None),
        ("seed", -1),
        ("seed", 2**64),
        ("max_period", 0),
        ("max_period", 1025),
        ("warmup_steps", -1),
        ("average_state", "m"),
        ("all_reduce", "sum"),
        ("min_bytes", -1),
        ("auto_attach", 1),
        ("auto_attach", "yes"),
        ("engine", "nccl"),
        ("engine", None),
        ("transport", "rdma"),
        ("transport", True),
    ],
)
def test_impossible_arguments_are_refused_with_what_is_allowed(name, value):
    with pytest.raises((TypeError, ValueError)) as caught:
        Options(**{name: value})
    text = str(caught.value)
    assert f"Options({name}={value!r})" in text
    assert "must be" in text


def test_gloo_through_shared_memory_is_refused_with_what_to_do(monkeypatch):
    text = 'engine="gloo" has no transport="shm"; take engine="native"'
    with pytest.raises(ValueError, match=text):
        Options(engine="gloo", transport="shm")
    monkeypatch.setenv("DSSYNC_ENGINE", "gloo")
    monkeypatch.setenv("DSSYNC_TRANSPORT", "shm")
    for outcome in run_ranks(2, rank_only, check=False, timeout=20):
        assert isinstance(outcome.error, ValueError) and text in str(outcome.error)
    assert Options(engine="native").transport == "shm"


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("DSSYNC_GROUP_SIZE", "two"),
        ("DSSYNC_GROUP_SIZE", "1"),
        ("DSSYNC_SEED", "0.5"),
        ("DSSYNC_AUTO_ATTACH", "maybe"),
        ("DSSYNC_PLAN", ""),
        ("DSSYNC_MIN_BYTES", "1k"),
        ("DSSYNC_ENGINE", "Native"),
        ("DSSYNC_TRANSPORT", "shared memory"),
    ],
)
def test_impossible_variables_are_refused_by_name(variable, text, monkeypatch):
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"{variable}={text!r} in the environment: must be"):
        Options()
    # An argument takes the variable's place, and then nobody asks what it says.
    name = variable.removeprefix("DSSYNC_").lower()
    assert getattr(Options(**{name: DEFAULTS[name]}), name) == DEFAULTS[name]


def test_unknown_names_are_refused_with_the_nearest_one(monkeypatch):
    with pytest.raises(TypeError, match="no 'groupsize'; did you mean group_size"):
        Options(groupsize=4)
    with pytest.raises(TypeError, match="there are group_size, plan, "):
        Options(zzz=4)
    with pytest.raises(TypeError, match="by name; got 4"):
        Options(4)
    monkeypatch.setenv("DSSYNC_GROUPSIZE", "4")
    with pytest.raises(ValueError, match=r"DSSYNC_GROUPSIZE='4' in the environment.*did you mean DSSYNC_GROUP_SIZE"):
        Options()


def test_build_variables_are_not_options(monkeypatch):
    monkeypatch.setenv("DSSYNC_WERROR", "1")
    assert Options() == Options()


def test_an_object_keeps_what_it_was_made_with(monkeypatch):
    made = Options(seed=5)
    monkeypatch.setenv("DSSYNC_MAX_PERIOD", "3")
    monkeypatch.setenv("DSSYNC_SEED", "6")
    for same in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), dataclasses.replace(made)):
        assert same == made
        assert same.max_period == 8
    assert Options(seed=5) != made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 1


def test_numpy_integers_become_plain_ones():
    options = Options(group_size=np.int64(4), seed=np.uint8(7))
    assert json.loads(options.to_json()) == {**DEFAULTS, "group_size": 4, "seed": 7}


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "group_size": st.just("auto") | st.integers(2, 2**24),
            "plan": st.sampled_from(["auto", "grid", "random", "exact", "leaders", "striped", "hybrid"]),
            "seed": st.integers(0, 2**64 - 1),
            "max_period": st.integers(1, 1024),
            "warmup_steps": st.integers(0, 10**9),
            "average_state": st.sampled_from(["none", "v", "all"]),
            "auto_attach": st.booleans(),
            "topology": st.sampled_from(["auto", "flat", "racks.toml"]),
            "engine": st.sampled_from(["auto", "native", "gloo"]),
            "transport": st.sampled_from(["auto", "shm", "tcp"]),
        },
    )
)
def test_json_tells_options_apart(values):
    assume((values.get("engine"), values.get("transport")) != ("gloo", "shm"))
    options = Options(**values)
    assert json.loads(options.to_json()) == {**DEFAULTS, **values}
    assert Options(**json.loads(options.to_json())) == options


# ---- across ranks ----------------------------------------------------------------------------------------------------------


def rank_only(rank, world_size):
    return rank


def errors_of(outcomes):
    """The error texts of a run in which every rank must have failed by itself, in seconds."""
    assert all(outcome.error is not None and outcome.exitcode == 0 for outcome in outcomes), "\n".join(map(str, outcomes))
    return [str(outcome.error) for outcome in outcomes]


def test_different_options_are_an_error_on_every_rank():
    options = [Options(), Options(), Options(group_size=3, seed=4), Options()]
    errors = errors_of(run_ranks(4, rank_only, pg_options=options, check=False, timeout=20))
    assert len(set(errors)) == 1
    assert 'group_size is "auto" on ranks 0, 1, 3, 3 on rank 2' in errors[0]
    assert "seed is 0 on ranks 0, 1, 3, 4 on rank 2" in errors[0]
    assert "max_period" not in errors[0]


def test_different_environments_are_an_error_on_every_rank():
    env = [{}, {"DSSYNC_ALL_REDUCE": "exact", "DSSYNC_ENGINE": "gloo"}, {"DSSYNC_TRANSPORT": "tcp"}]
    errors = errors_of(run_ranks(3, rank_only, env=env, check=False, timeout=20))
    assert len(set(errors)) == 1
    assert 'all_reduce is "avg" on ranks 0, 2, "exact" on rank 1' in errors[0]
    assert 'engine is "auto" on ranks 0, 2, "gloo" on rank 1' in errors[0]
    assert 'transport is "auto" on ranks 0, 1, "tcp" on rank 2' in errors[0]


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_one_rank_with_an_unknown_variable_is_an_error_on_every_rank(bad_rank):
    env = [{"DSSYNC_WARMUP": "10"} if rank == bad_rank else {} for rank in range(3)]
    errors = errors_of(run_ranks(3, rank_only, env=env, check=False, timeout=20))
    for rank, error in enumerate(errors):
        assert "DSSYNC_WARMUP='10'" in error
        assert "did you mean DSSYNC_WARMUP_STEPS" in error
        assert rank == bad_rank or f"on rank {bad_rank}" in error


def test_foreign_options_are_refused_by_type():
    outcomes = run_ranks(2, rank_only, pg_options=[{"plan": "grid"}, None], check=False, timeout=20)
    first, second = errors_of(outcomes)
    assert isinstance(outcomes[0].error, TypeError)
    assert "must be dssync_pg.Options, got builtins.dict" in first
    assert "on rank 0: dssync: pg_options must be" in second


def test_a_plan_that_cannot_be_is_an_error_on_every_rank():
    errors = errors_of(run_ranks(3, rank_only, pg_options=Options(plan="grid", group_size=2), check=False, timeout=20))
    assert len(set(errors)) == 1
    assert errors[0].startswith("dssync: the default group cannot be made: ")


def options_for_one_rank_only(rank, world_size):
    dist.new_group(backend="dssync", pg_options=Options(seed=1) if rank == 1 else None)


def test_options_given_on_one_rank_only_are_an_error_on_every_rank():
    errors = errors_of(run_ranks(3, options_for_one_rank_only, check=False, timeout=20))
    assert len(set(errors)) == 1
    assert "averages is false on ranks 0, 2, true on rank 1" in errors[0]


def late(rank, world_size):
    if rank == 1:
        return "never came"
    dist.init_process_group("dssync", timeout=timedelta(seconds=2))


def test_a_rank_that_never_comes_is_named():
    first, absent, third = run_ranks(3, late, init=False, check=False, timeout=40)
    assert absent.value == "never came"
    for outcome in (first, third):
        assert isinstance(outcome.error, TimeoutError)
        assert "the making of the default group: rank 1 of 3 did not come within 2 s" in str(outcome.error)


def exchanged(rank, world_size):
    store = rank_store()
    for turn in range(3):
        place = meeting_place(store, str(turn))
        views = exchange(place, rank, world_size, timedelta(seconds=20), "a test", {"rank": rank, "turn": (turn, "x")})
        assert views == [{"rank": other, "turn": [turn, "x"]} for other in range(world_size)]
    return store.num_keys()


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_exchange_gives_every_value_by_rank_and_leaves_no_key(world_size):
    assert run_ranks(world_size, exchanged, init=False)[0] == 0  # rank 0 is the last to leave


def missing(rank, world_size):
    _agreement._GRACE = timedelta(seconds=1)
    if rank:
        exchange(rank_store(), rank, world_size, timedelta(seconds=1), "a test", rank)


def test_without_rank_0_the_others_say_so():
    absent, *others = run_ranks(3, missing, init=False, check=False, timeout=40)
    assert absent.ok
    for outcome in others:
        assert isinstance(outcome.error, TimeoutError)
        assert "for rank 0, which has not come" in str(outcome.error)
