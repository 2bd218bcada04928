"""Topologies: what is written is what is read, and what cannot be is blamed by file and line."""

import json
import math
import pickle
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dssync_pg import Topology, TopologyError
from dssync_pg._slurm import expand_hosts, expand_tasks
from dssync_pg._topology_source import find
from dssync_pg._units import format_latency, format_rate, parse_latency, parse_rate, shortest_latency, shortest_rate
from dssync_pg.topology import Host, Link, Rack, slurm_address

rates = st.floats(1e-3, 1e15) | st.just(math.inf) | st.integers(1, 400).map(lambda count: count * 1e8)
latencies = st.floats(0, 10) | st.integers(0, 900).map(lambda count: count / 1e6)
links = st.builds(Link, rates, latencies)
names = st.text(st.characters(exclude_characters="[]", exclude_categories=["C"]), min_size=1).filter(str.strip)


@st.composite
def topologies(draw):
    """Any shape, ranks scattered over the hosts by chance."""
    shape = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4))
    ranks = draw(st.permutations(range(sum(map(sum, shape)))))
    host_names = iter(draw(st.lists(names, unique=True, min_size=sum(map(len, shape)), max_size=sum(map(len, shape)))))
    rack_names = draw(st.lists(names, unique=True, min_size=len(shape), max_size=len(shape)))
    unused = iter(ranks)
    racks = []
    for name, counts in zip(rack_names, shape, strict=True):
        hosts = [Host(next(host_names), tuple(next(unused) for _ in range(count)), draw(links)) for count in counts]
        racks.append(Rack(name, tuple(hosts), draw(links)))
    return Topology(racks, draw(links))


def doc_example():
    """The file in the docstring."""
    return "\n".join(line[8:] for line in Topology.__doc__.splitlines() if line.startswith("        "))


def test_the_documented_file():
    topology = Topology.from_toml(doc_example())
    assert topology.world_size == 14
    assert [(rack.name, rack.uplink, rack.ranks) for rack in topology.racks] == [
        ("left", Link(100e6, 200e-6), list(range(12))),
        ("rack1", Link(100e6), [12, 13]),
    ]
    assert [(host.name, host.ranks) for host in topology.hosts[:4]] == [
        ("node01", (0, 1, 2, 3)),
        ("node02", (4, 5, 6, 7)),
        ("node03", (8, 9, 10, 11)),
        ("host3", (12,)),
    ]
    assert [host.nic.rate for host in topology.hosts] == [5e8, 5e8, 5e8, 1e8, 1e8]
    assert topology.memory == Link(40e9)


@given(topologies())
def test_every_text_comes_back(topology):
    assert Topology.from_json(topology.to_json()) == topology
    assert Topology.from_toml(topology.to_toml()) == topology
    copy = pickle.loads(pickle.dumps(topology))
    assert copy == topology and hash(copy) == hash(topology) and copy.to_json() == topology.to_json()
    assert f"{topology.world_size} worker" in str(topology)


@given(topologies())
def test_the_core_holds_the_same(topology):
    for number, host in enumerate(topology.hosts):
        assert [rank for rank in range(topology.world_size) if topology.host_of[rank] == number] == sorted(host.ranks)
        assert topology.core.nics[number] == (host.nic.rate / 8, host.nic.latency)
    for number, rack in enumerate(topology.racks):
        assert topology.core.rack(number) == rack.ranks
        assert [rank for rank in range(topology.world_size) if topology.rack_of[rank] == number] == rack.ranks
        assert topology.core.uplinks[number] == (rack.uplink.rate / 8, rack.uplink.latency)
    assert topology.core.memory == (topology.memory.rate / 8, topology.memory.latency)


@pytest.mark.parametrize("name", ["cluster.toml", "cluster.json", "cluster"])
def test_files_are_saved_and_loaded(tmp_path, name):
    topology = Topology.uniform(2, 2, 3, nic=("500 Mbit/s", "50 us"), uplink="100 Mbit/s")
    topology.save(tmp_path / name)
    assert Topology.load(tmp_path / name, world_size=12) == topology
    assert name != "cluster.json" or json.loads((tmp_path / name).read_text())["world_size"] == 12


def test_equal_things_are_written_once():
    topology = Topology.from_toml("""
        workers = 2
        [[rack]]
        name = "r"
        count = 3
        uplink = "1 Gbit/s"
        host = [{ count = 2, nic_latency = 1e-3 }]
    """)
    assert [rack.name for rack in topology.racks] == ["r0", "r1", "r2"]
    assert [rack.ranks for rack in topology.racks] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert {host.nic for host in topology.hosts} == {Link(math.inf, 1e-3)}


def test_what_is_near_wins():
    topology = Topology.from_toml("""
        nic = 1e6
        workers = 2
        [[rack]]
        nic = 2e6
        host = [{ nic = 3e6 }, { workers = 1 }]
        [[rack]]
        workers = 3
        host = [{}]
    """)
    assert [(host.nic.rate, len(host.ranks)) for host in topology.hosts] == [(3e6, 2), (2e6, 1), (1e6, 3)]


def test_ranks_can_be_given():
    topology = Topology.from_toml("[[rack]]\nhost = [{ ranks = [0, 2] }]\n[[rack]]\nhost = [{ ranks = [3, 1] }]")
    assert topology.rack_of == (0, 1, 0, 1)
    assert topology.core.rack(1) == [1, 3]


WRONG = {
    "nothing": ("", 1, "no rack, expected at least one"),
    "no toml": ("[[rack]]\nname = \n", 2, "this is no TOML"),
    "open end": ("[[rack]]\nhost = [\n{}\n", 4, "this is no TOML"),
    "no host": ("[[rack]]\nhost = [{}]\n\n[[rack]]\nname = 'b'\n", 5, "rack 'b' has no host"),
    "unknown key": ("[[rack]]\n# uplin\nuplnk = 3\n", 3, "a rack has no 'uplnk'; did you mean 'uplink'?"),
    "unknown key of a host": ("[[rack]]\n[[rack.host]]\nworker = 3\n", 3, "did you mean 'workers'?"),
    "unknown key far off": ("speed = 3\n", 1, "a topology has no 'speed'; expected world_size"),
    "quoted key": ('[[rack]]\n"up link" = 3\n', 2, "'up link'"),
    "one table": ("\n[rack]\nname = 'a'\n", 2, "expected a list of them: [[rack]]"),
    "one host": ("[[rack]]\n[rack.host]\nname = 'a'\n", 2, "expected a list of them: [[rack.host]]"),
    "host that is none": ("[[rack]]\nhost = [\n  {},\n  3]\n", 4, "3 is not a host"),
    "rate of zero": ("[[rack]]\nuplink = 0\nhost = [{}]\n", 2, "uplink is 0, expected a rate above 0"),
    "negative rate": ("nic = -5.5\n[[rack]]\nhost = [{}]\n", 1, "nic is -5.5, expected a rate"),
    "rate that nothing inherits": ("nic = 'x'\n[[rack]]\nhost = [{ nic = 5 }]\n", 1, "nic is 'x', expected a rate"),
    "bytes": ("[[rack]]\nhost = [{\n nic = '3 MB/s' }]\n", 2, "this is no TOML"),
    "bytes on a line": ("[[rack]]\nhost = [{},\n { nic = '3 MB/s' }]\n", 3, 'expected a rate above 0, as "500 Mbit/s"'),
    "not a number": ("[[rack]]\nuplink = nan\nhost = [{}]\n", 2, "uplink is nan"),
    "truth": ("[[rack]]\nuplink = true\nhost = [{}]\n", 2, "uplink is True"),
    "latency": ("[[rack]]\n[[rack.host]]\nnic_latency = '5 years'\n", 3, 'expected a time of at least 0, as "50 us"'),
    "endless latency": ("memory_latency = inf\n[[rack]]\nhost = [{}]\n", 1, "memory_latency is inf"),
    "workers": ("[[rack]]\nhost = [{},\n{ workers = 0 }]\n", 3, "workers is 0, expected an integer from 1"),
    "too many workers": ("[[rack]]\nhost = [{},\n{ workers = 16777216 }]\n", 3, "16777217 workers, expected at most 16777216"),
    "count": ("[[rack]]\ncount = 1.5\nhost = [{}]\n", 2, "count is 1.5"),
    "count and names": ("[[rack]]\n[[rack.host]]\nname = 'n[1-3]'\ncount = 2\n", 4, "count is 2, but name lists 3"),
    "name": ("[[rack]]\nname = 7\nhost = [{}]\n", 2, "name is 7, expected a text"),
    "host list": ("[[rack]]\nhost = [{}, \n{name = 'n[3-1]'}]\n", 3, "no range of numbers"),
    "host twice": ("[[rack]]\nhost = [{ name = 'a' },\n {},\n { name = 'a' }]\n", 4, "host name 'a' occurs twice"),
    "host twice by count": ("[[rack]]\nname = 'x'\ncount = 2\n[[rack.host]]\nname = 'a'\n", 5, "in rack 'x0' and in rack 'x1'"),
    "rack twice": ("[[rack]]\nname = 'a'\nhost = [{}]\n[[rack]]\nhost = [{}]\nname = 'a'\n", 6, "rack name 'a' occurs twice"),
    "rank twice": ("[[rack]]\nhost = [{ ranks = [0, 1] },\n { ranks = [1] }]\n", 3, "rank 1 occurs twice, on host 'host0'"),
    "rank twice on a host": ("[[rack]]\nhost = [{ ranks = [0] },\n { ranks = [1, 1] }]\n", 3, "rank 1 occurs twice"),
    "gap": ("[[rack]]\nhost = [{ ranks = [0] },\n { ranks = [3] },\n { ranks = [1] }]\n", 3, "rank 3 and no host has rank 2"),
    "no ranks": ("[[rack]]\nhost = [{ ranks = [] }]\n", 2, "expected a list of ranks"),
    "rank that is none": ("[[rack]]\nhost = [{ ranks = [0, -1] }]\n", 2, "a list with -1"),
    "some ranks": ("[[rack]]\nhost = [{ ranks = [0] },\n {}]\n", 3, "ranks for all hosts or for none"),
    "late ranks": ("[[rack]]\nhost = [{},\n { ranks = [1] }]\n", 3, "ranks for all hosts or for none"),
    "ranks and workers": ("[[rack]]\nhost = [{ ranks = [0],\n workers = 2 }]\n", 2, "this is no TOML"),
    "workers and ranks": ("[[rack]]\n[[rack.host]]\nranks = [0]\nworkers = 2\n", 4, "workers is 2, but ranks lists 1"),
    "world size": ("[[rack]]\nhost = [{}]\n", 1, "the topology has 1 workers, expected 5"),
    "own world size": ("\nworld_size = 3\n[[rack]]\nhost = [{}]\n", 2, "world_size is 3, but the workers of the hosts add up to 1"),
    "after odd texts": ('name = """\n[[rack]]\n\\"""\n"""\n', 1, "a topology has no 'name'"),
    "json": ('{"rack": [\n{"host": [{}]},\n{"host": [\n{"nic": 0}\n]}]}', 4, "nic is 0"),
    "json with a break before its values": ('{"rack":\n [{"host":\n [{}], "uplink"\n:\n0}]}', 3, "uplink is 0"),
    "no json": ('{"rack": [\n}', 2, "this is no JSON"),
    "json twice": ('{"rack": [{"host": [\n{"name": "a",\n"name": "b"}]}]}', 3, "'name' is given twice"),
    "deep json": ('{"rack":' + "[" * 200_000, 1, "nested too deep"),
    "deep json that can be read": ('{"rack":' + "[" * 900 + "]" * 900 + "}", 1, ""),
    "deep toml": ("rack = " + "[" * 900 + "]" * 900, 1, ""),
    "a number beyond all floats": ("nic = 1" + "0" * 400 + "\n[[rack]]\nhost = [{}]\n", 1, "nic is 1"),
    "a number beyond all integers": ("\nnic = 1" + "0" * 5000, 1, "digits"),
}


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text("[[rack]]\nhost = [{}]\n", encoding="utf-8-sig")
    assert Topology.load(path).world_size == 1


@pytest.mark.parametrize(("text", "line", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_files_are_blamed_by_line(tmp_path, text, line, expected):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(TopologyError) as caught:
        Topology.load(path, world_size=5 if line == 1 and "5" in expected else None)
    assert str(caught.value).startswith(f"{path}:")
    assert expected in str(caught.value)
    if expected != "this is no TOML":  # whose line tomllib tells, in words that change
        assert str(caught.value).startswith(f"{path}:{line}: ")


@given(st.data())
def test_whatever_is_cut_or_changed_raises_nothing_else(data):
    text = data.draw(st.sampled_from([doc_example(), Topology.from_toml(doc_example()).to_json(indent=1)]))
    at = data.draw(st.integers(0, len(text)))
    inserted = data.draw(st.text(st.sampled_from("[]{}=:,\"'#\\\n.0a-"), max_size=4) | st.text(max_size=4))
    changed = text[:at] + inserted + text[at + data.draw(st.integers(0, 20)) :]
    try:
        assert Topology.from_json(changed) if text.startswith("{") else Topology.from_toml(changed)
    except TopologyError as error:
        found = re.match(r"<(toml|json)>:(\d+): ", str(error))
        assert found and 1 <= int(found[2]) <= changed.count("\n") + 1


@given(st.data())
def test_the_line_of_a_key_is_where_it_stands(data):
    """A key that no table knows, put somewhere into a file with every kind of value."""
    lines = [line for line in doc_example().splitlines() if line]
    lines.insert(3, 'memory_latency = """2 \\\n  us"""  # a = "b')
    index = data.draw(st.integers(0, len(lines)))
    lines[index:index] = ["'colour' = [ # ]\n 'blue', {a.b = 1}, 1979-05-27 07:32:00,\n]"]
    text = "\n".join(lines)
    with pytest.raises(TopologyError) as caught:
        Topology.from_toml(text)
    line = text[: text.index("'colour'")].count("\n") + 1
    assert str(caught.value).startswith(f"<toml>:{line}: ") and "'colour'" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TopologyError, match=r"missing\.toml: the topology cannot be read: No such file"):
        Topology.load(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b"world_size = 1\n# caf\xe9\n")
    with pytest.raises(TopologyError, match=r"latin\.toml:2: this is no UTF-8"):
        Topology.load(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("racks", "text"),
    [
        ([], "no rack"),
        ([Rack("r", ())], "no host"),
        ([Rack("r", (Host("a", ()),))], "no worker"),
        ([Rack("r", (Host("a", (0,)), Host("a", (1,))))], "occurs twice"),
        ([Rack("r", (Host("a", (1,)),))], "no host has rank 0"),
        ([Rack("r", (Host("a", (0, -1)),))], "rank -1 and no host has rank 1"),
        ([Rack("r", (Host("a[1]", (0,)),))], "a list of names"),
        ([Rack("r", (Host("a", (0,), Link(0)),))], "the NIC of host 0 has a rate of 0"),
        ([Rack("r", (Host("a", (0,)),), Link(1, -1))], "the uplink of rack 0 has a latency of -1"),
    ],
)
def test_wrong_racks_are_refused(racks, text):
    with pytest.raises(TopologyError, match=text):
        Topology(racks)


def test_makers():
    assert Topology.flat(7, 2, nic="1 Gbit/s").host_of == (0, 0, 1, 1, 2, 2, 3)
    assert Topology.flat(3).racks == (Rack("rack0", tuple(Host(f"host{rank}", (rank,)) for rank in range(3))),)
    uniform = Topology.uniform(2, 2, 2, nic=(5e8, "50 us"), uplink=Link(1e8), memory="4 Gbit/s")
    assert uniform.rack_of == (0, 0, 0, 0, 1, 1, 1, 1) and uniform.memory == Link(4e9)
    assert {host.nic for host in uniform.hosts} == {Link(5e8, 5e-5)}
    for make in (lambda: Topology.flat(0), lambda: Topology.flat(4, 0), lambda: Topology.uniform(1 << 20, 1 << 20)):
        with pytest.raises(TopologyError):
            make()


def test_links_are_exchanged():
    topology = Topology.uniform(2, 1, 2, nic="1 Gbit/s", uplink="100 Mbit/s")
    changed = topology.with_links(uplinks=[None, "40 Mbit/s"], memory=1e9)
    assert [rack.uplink.rate for rack in changed.racks] == [1e8, 4e7]
    assert changed.hosts == topology.hosts and changed.memory.rate == 1e9
    assert [host.nic.rate for host in topology.with_links(nics="10 Gbit/s").hosts] == [1e10, 1e10]
    with pytest.raises(TopologyError, match="1 uplinks for 2 racks"):
        topology.with_links(uplinks=["1 Gbit/s"])


def test_topologies_cannot_be_changed():
    with pytest.raises(AttributeError):
        Topology.flat(2).racks = ()


def test_large_ones_print_few_lines_and_are_made_quickly():
    begin = time.process_time()
    topology = Topology.uniform(512, 16, 8, nic="100 Gbit/s", uplink="400 Gbit/s")
    assert Topology.from_json(topology.to_json()) == topology
    assert time.process_time() - begin < 5
    assert len(str(topology).splitlines()) == 3
    odd = Topology.from_toml("".join(f"[[rack]]\nuplink = {number + 1}\nhost = [{{}}]\n" for number in range(100)))
    assert str(odd).endswith("and 84 more racks")


# ---- units -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("500 Mbit/s", 5e8),
        ("500mbit", 5e8),
        ("1.5Gbit/s", 1.5e9),
        ("10 Gbps", 1e10),
        ("10 Gb/s", 1e10),
        ("64 kbit/s", 64e3),
        ("300 bit/s", 300),
        ("1e3 bit/s", 1e3),
        (7, 7),
        (math.inf, math.inf),
    ],
)
def test_rates(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "fast", "3 MB/s", "3 MBps", "-3 Mbit/s", "0 Mbit/s", "3", 0, -1, math.nan, None, True, [], "3 Mbit/h"]
)
def test_wrong_rates(text):
    with pytest.raises(ValueError, match="expected a rate"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "latency"), [("50 us", 5e-5), ("50µs", 5e-5), ("1.5 ms", 1.5e-3), ("2s", 2), ("7 ns", 7e-9), (0, 0)]
)
def test_latencies(text, latency):
    assert parse_latency(text) == latency


@pytest.mark.parametrize("text", ["", "50", "-1 us", -1, math.inf, math.nan, True, None, "1 h"])
def test_wrong_latencies(text):
    with pytest.raises(ValueError, match="expected a time"):
        parse_latency(text)


@given(rates, latencies)
def test_what_is_written_is_exact(rate, latency):
    assert parse_latency(shortest_latency(latency)) == latency
    if not math.isinf(rate):
        assert parse_rate(shortest_rate(rate)) == rate
        assert parse_rate(format_rate(rate)) == pytest.approx(rate, rel=1e-3)
    assert parse_latency(format_latency(latency)) == pytest.approx(latency, rel=1e-3, abs=1e-12)


# ---- Slurm -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", "node1"),
        ("node[08-11],gpu", "node08 node09 node10 node11 gpu"),
        ("n[1,3-4]-ib,m[2]", "n1-ib n3-ib n4-ib m2"),
        ("r[0-1]n[08,10]", "r0n08 r0n10 r1n08 r1n10"),
        ("n[9-11]", "n9 n10 n11"),
        ("n[001-002]", "n001 n002"),
        ("a.b.c,d", "a.b.c d"),
    ],
)
def test_host_lists(text, hosts):
    assert expand_hosts(text) == hosts.split()


@pytest.mark.parametrize(
    "text", ["", "a,,b", "n[", "n]", "n[]", "n[1-]", "n[a-b]", "n[3-1]", "n[1-2", "n[0-9999999999]", "n[0-9999][0-9999]"]
)
def test_wrong_host_lists(text):
    with pytest.raises(ValueError, match=r"expected one as|more than"):
        expand_hosts(text)


def test_tasks():
    assert expand_tasks("2(x3),1") == [2, 2, 2, 1]
    for wrong in ("", "2(x", "x", "0", "2(x9999999)", "-1"):
        with pytest.raises(ValueError, match="no number of tasks"):
            expand_tasks(wrong)


def hosts_and_ranks(topology):
    return {host.name: host.ranks for host in topology.hosts}


def test_a_slurm_job():
    job = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "2(x2),1"}
    assert hosts_and_ranks(Topology.from_slurm(job)) == {"n1": (0, 1), "n2": (2, 3), "n3": (4,)}
    cyclic = {**job, "SLURM_DISTRIBUTION": "cyclic:block"}
    assert hosts_and_ranks(Topology.from_slurm(cyclic)) == {"n1": (0, 3), "n2": (1, 4), "n3": (2,)}
    assert hosts_and_ranks(Topology.from_slurm(job, workers_per_host=1)) == {"n1": (0,), "n2": (1,), "n3": (2,)}
    step = {**job, "SLURM_STEP_NODELIST": "n2", "SLURM_STEP_TASKS_PER_NODE": "3"}
    assert hosts_and_ranks(Topology.from_slurm(step)) == {"n2": (0, 1, 2)}
    each = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS_PER_NODE": "2"}
    assert hosts_and_ranks(Topology.from_slurm(each)) == {"n1": (0, 1), "n2": (2, 3)}
    assert hosts_and_ranks(Topology.from_slurm({"SLURM_JOB_NODELIST": "n[1-2]"})) == {"n1": (0,), "n2": (1,)}


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({}, "SLURM_JOB_NODELIST is not set"),
        ({"SLURM_JOB_NODELIST": "n[1-"}, "SLURM_JOB_NODELIST: 'n"),
        ({"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "2,1"}, "SLURM_TASKS_PER_NODE='2,1' is of 2 hosts"),
        ({"SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS_PER_NODE": "x"}, "SLURM_NTASKS_PER_NODE: 'x'"),
        ({"SLURM_JOB_NODELIST": "n1", "SLURM_DISTRIBUTION": "plane=4"}, "write a topology file"),
    ],
)
def test_wrong_slurm_jobs(environ, text):
    with pytest.raises(TopologyError, match=re.escape(text)):
        Topology.from_slurm(environ)


def test_switches_are_racks():
    gathered = [("n1", "s0.s1.n1"), ("n2.x", "s0.s2.n2.x"), ("n1", "s0.s1.n1"), ("n3", "s0.s2.n3"), ("n4", "s9.s1.n4")]
    topology = Topology.from_slurm_addresses(gathered)
    assert [(rack.name, rack.ranks) for rack in topology.racks] == [("s0.s1", [0, 2]), ("s0.s2", [1, 3]), ("s9.s1", [4])]
    assert topology.hosts[0] == Host("n1", (0, 2))


def test_this_ranks_own_address():
    assert slurm_address({}) is None
    assert slurm_address({"SLURM_TOPOLOGY_ADDR": "n1", "SLURM_TOPOLOGY_ADDR_PATTERN": "node", "SLURMD_NODENAME": "n1"}) is None
    environ = {"SLURM_TOPOLOGY_ADDR": "s0.s1.n1.example", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node"}
    assert slurm_address(environ) == ("n1.example", "s0.s1.n1.example")
    assert slurm_address({**environ, "SLURMD_NODENAME": "n1.example"}) == ("n1.example", "s0.s1.n1.example")


# ---- which source ----------------------------------------------------------------------------------------------------------


def find_on_all(monkeypatch, option_of, environments):
    """What `find` gives, or raises, on each rank: each is called twice, first to see what it would have the others gather."""
    gathered = []

    class Met(Exception):
        pass

    def gather(value):
        if len(gathered) == len(environments):
            return gathered
        gathered.append(json.loads(json.dumps(value)))
        raise Met

    def found(rank):
        for name in ("SLURM_TOPOLOGY_ADDR", "SLURM_TOPOLOGY_ADDR_PATTERN", "SLURMD_NODENAME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environments[rank].items():
            monkeypatch.setenv(name, value)
        try:
            return find(option_of(rank), rank, len(environments), gather)
        except (Met, TopologyError) as error:
            return error

    ranks = range(len(environments))
    assert all(isinstance(found(rank), Met) for rank in ranks)
    return [found(rank) for rank in ranks]


def slurm_rank(host, address):
    pattern = "switch." * address.count(".") + "node"
    return {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": pattern, "SLURMD_NODENAME": host}


def test_the_file_comes_first_and_only_rank_0_needs_it(monkeypatch, tmp_path):
    topology = Topology.uniform(2, 1, 1, uplink="100 Mbit/s")
    topology.save(tmp_path / "cluster.toml")
    paths = [str(tmp_path / "cluster.toml"), str(tmp_path / "missing.toml")]
    found = find_on_all(monkeypatch, lambda rank: paths[rank], [slurm_rank("a", "s0.a"), slurm_rank("b", "s1.b")])
    assert found == [(topology, f"the file {paths[0]}")] * 2


def test_a_wrong_file_is_an_error_on_every_rank(monkeypatch, tmp_path):
    path = str(tmp_path / "cluster.toml")
    Topology.flat(3).save(path)
    found = find_on_all(monkeypatch, lambda rank: path, [{}, {}])
    for error in found:
        assert isinstance(error, TopologyError)
        assert str(error) == f"{path}:1: the topology has 3 workers, expected 2: the world size of the job"


def test_then_slurm_then_nothing(monkeypatch):
    def none(rank):
        return ""

    [found, other] = find_on_all(monkeypatch, none, [slurm_rank("a", "s0.a"), slurm_rank("b", "s1.b")])
    assert found == other
    assert found == (Topology([Rack("s0", (Host("a", (0,)),)), Rack("s1", (Host("b", (1,)),))]), "Slurm's topology variables")
    assert find_on_all(monkeypatch, none, [slurm_rank("a", "a"), slurm_rank("b", "b")]) == [(None, "flat")] * 2
    [(nothing, why), _] = find_on_all(monkeypatch, none, [slurm_rank("a", "s0.a"), {}])
    assert nothing is None and "on rank 1" in why
