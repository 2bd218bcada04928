"""Topology files, TOML or JSON of one shape (see `Topology`): read, checked, and blamed by file and line.

tomllib and json tell lines only of what they cannot read. What they can read and we cannot accept is found again by a scanner that
knows just enough of both to see where a key stands; it runs only when there is something to say.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

from ._slurm import expand_hosts
from ._units import parse_latency, parse_rate
from .topology import MAX_WORLD_SIZE, Contradiction, Host, Link, Rack, Topology, TopologyError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_Path: TypeAlias = tuple[str | int, ...]
_T = TypeVar("_T")

_HOST_KEYS = ("name", "count", "workers", "ranks", "nic", "nic_latency")
_RACK_KEYS = ("name", "count", "uplink", "uplink_latency", "nic", "nic_latency", "workers", "host")
_FILE_KEYS = ("world_size", "memory", "memory_latency", "uplink", "uplink_latency", "nic", "nic_latency", "workers", "rack")


def read(path: str | os.PathLike[str], world_size: int | None) -> Topology:
    """Raises TopologyError."""
    name = os.fspath(path)
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TopologyError(f"{name}: the topology cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = Path(name).read_bytes()[: error.start].count(b"\n") + 1
        raise TopologyError(f"{name}:{line}: this is no UTF-8 text") from None
    return parse(text, name, world_size, is_json=Path(name).suffix == ".json" or text.lstrip().startswith("{"))


def parse(text: str, name: str, world_size: int | None, is_json: bool) -> Topology:
    """name: of the file, for errors. Raises TopologyError."""
    source = _Source(text, name, is_json)
    try:
        return _build(source, world_size)
    except RecursionError:
        source.fail(1, "this is nested too deep for a topology")


def _build(source: _Source, world_size: int | None) -> Topology:
    root = _Table(source, (), source.tables(), "a topology", _FILE_KEYS)
    maker = _Maker(root)
    racks = maker.racks()
    memory = root.link("memory")
    try:
        topology = Topology(racks, memory)
    except Contradiction as error:
        origin = maker.racks_from[error.rack] if error.host is None else maker.hosts_from[error.rack][error.host]
        origin.fail(error.key, str(error))
    except TopologyError as error:
        root.fail("rack", str(error))
    root.check_world_size(topology.world_size, world_size)
    return topology


class _Source:
    """A text, and where it came from."""

    def __init__(self, text: str, name: str, is_json: bool) -> None:
        self.text, self.name, self.is_json = text, name, is_json

    def tables(self) -> dict[str, Any]:
        try:
            value = json.loads(self.text, object_pairs_hook=self._pairs) if self.is_json else tomllib.loads(self.text)
        except json.JSONDecodeError as error:
            self.fail(error.lineno, f"this is no JSON: {error.msg}")
        except tomllib.TOMLDecodeError as error:
            found = re.search(r" \(at line (\d+), column \d+\)", str(error))
            line = int(found[1]) if found else self.text.count("\n") + 1
            self.fail(line, f"this is no TOML: {str(error).replace(found[0] if found else ' (at end of document)', '')}")
        except TopologyError:
            raise
        except ValueError as error:  # a number of thousands of digits
            self.fail(1, str(error))
        if not isinstance(value, dict):
            self.fail(1, "expected an object with racks")
        return value

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            for path, line in _Lines(self.text, self.is_json).repeated:
                self.fail(line, f"{path[-1]!r} is given twice")
        return dict(pairs)

    def fail(self, line: int, text: str) -> NoReturn:
        raise TopologyError(f"{self.name}:{line}: {text}")

    def line_of(self, path: _Path) -> int:
        """The line of a key, or of the nearest thing around it."""
        lines = _Lines(self.text, self.is_json).line_of
        while path and path not in lines:
            path = path[:-1]
        return lines.get(path, 1)


class _Table:
    """One table of the file, with checked access to its values."""

    def __init__(
        self, source: _Source, path: _Path, values: Any, what: str, keys: Iterable[str], outer: _Table | None = None
    ) -> None:
        self.source, self.path, self.what, self.outer = source, path, what, outer
        self.values: dict[str, Any] = values if isinstance(values, dict) else {}
        if not isinstance(values, dict):
            self.fail(None, f"{values!r} is not {what}, expected a table with {', '.join(keys)}")
        for key in self.values:
            if key not in keys:
                close = difflib.get_close_matches(key, keys, n=1)
                meant = f"did you mean {close[0]!r}?" if close else f"expected {', '.join(keys)}"
                self.fail(key, f"{what} has no {key!r}; {meant}")

    def fail(self, key: str | None, text: str) -> NoReturn:
        self.source.fail(self.source.line_of(self.path if key is None else (*self.path, key)), text)

    def take(self, key: str, accept: Callable[[Any], _T], default: _T, inherits: bool = False) -> _T:
        """The value of a key; if it inherits, else that of the tables around this one, which must be right in any case."""
        if inherits and self.outer:
            default = self.outer.take(key, accept, default, inherits)
        if key not in self.values:
            return default
        try:
            return accept(self.values[key])
        except ValueError as error:
            self.fail(key, f"{key} is {error}")

    def link(self, name: str) -> Link:
        unknown = Link()
        rate = self.take(name, parse_rate, unknown.rate, inherits=True)
        return Link(rate, self.take(f"{name}_latency", parse_latency, unknown.latency, inherits=True))

    def tables(self, key: str, what: str, keys: Iterable[str]) -> list[_Table]:
        values = self.values.get(key, [])
        if not isinstance(values, list):
            self.fail(
                key,
                f"{key} is one table, expected a list of them: [[{'.'.join(p for p in (*self.path, key) if isinstance(p, str))}]]",
            )
        return [_Table(self.source, (*self.path, key, i), value, what, keys, self) for i, value in enumerate(values)]

    def check_world_size(self, found: int, wanted: int | None) -> None:
        said = self.take("world_size", _count, found)
        if said != found:
            self.fail("world_size", f"world_size is {said}, but the workers of the hosts add up to {found}")
        if wanted is not None and wanted != found:
            key = "world_size" if "world_size" in self.values else "rack"
            self.fail(key, f"the topology has {found} workers, expected {wanted}: the world size of the job")


class _Maker:
    """Racks of the tables, and for each rack and host the table that it came from."""

    def __init__(self, root: _Table) -> None:
        self.root = root
        self.racks_from: list[_Table] = []
        self.hosts_from: list[list[_Table]] = []
        self.world_size = 0
        self.host_count = 0
        self.are_given = False  # whether hosts list their ranks

    def racks(self) -> list[Rack]:
        racks = []
        for table in self.root.tables("rack", "a rack", _RACK_KEYS):
            for name in _names(table, _text, lambda: f"rack{len(self.racks_from)}"):
                self.racks_from.append(table)
                self.hosts_from.append([])
                racks.append(Rack(name, tuple(self.hosts(table)), table.link("uplink")))
        return racks

    def hosts(self, rack: _Table) -> Iterator[Host]:
        for table in rack.tables("host", "a host", _HOST_KEYS):
            nic = table.link("nic")
            for name in _names(table, _host_list, lambda: f"host{self.host_count}"):
                self.hosts_from[-1].append(table)
                self.host_count += 1
                yield Host(name, self.ranks(table), nic)

    def ranks(self, table: _Table) -> tuple[int, ...]:
        given = table.take("ranks", _ranks, tuple[int, ...]())
        workers = table.take("workers", _count, 1, inherits=not given)
        if self.world_size and bool(given) != self.are_given:
            had = "have" if self.are_given else "have not"
            table.fail("ranks", f"expected ranks for all hosts or for none: the hosts above {had}")
        self.are_given = bool(given)
        if given and "workers" in table.values and workers != len(given):
            table.fail("workers", f"workers is {workers}, but ranks lists {len(given)}; leave one of them out")
        first = self.world_size
        self.world_size += len(given) or workers
        if self.world_size > MAX_WORLD_SIZE:
            table.fail(None, f"up to here there are {self.world_size} workers, expected at most {MAX_WORLD_SIZE}")
        return given or tuple(range(first, self.world_size))


def _names(table: _Table, accept: Callable[[Any], list[str]], default: Callable[[], str]) -> Iterator[str]:
    """The name of each rack or host that a table stands for; a default is made when asked for, since it counts."""
    names = table.take("name", accept, list[str]())
    count = table.take("count", _count, len(names) or 1)
    if not names:
        yield from (default() for _ in range(count))
    elif len(names) == 1 < count:
        yield from (f"{names[0]}{index}" for index in range(count))
    elif count != len(names):
        table.fail("count", f"count is {count}, but name lists {len(names)}; leave one of them out")
    else:
        yield from names


def _text(value: Any) -> list[str]:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r}, expected a text")
    return [value]


def _host_list(value: Any) -> list[str]:
    [text] = _text(value)
    return expand_hosts(text) if "[" in text or "]" in text else [text]


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_WORLD_SIZE:
        raise ValueError(f"{value!r}, expected an integer from 1 to {MAX_WORLD_SIZE}")
    return value


def _ranks(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{value!r}, expected a list of ranks, as [0, 1]")
    for rank in value:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"a list with {rank!r}, expected ranks, as [0, 1]")
    return tuple(value)


class _Lines:
    """On which line each key and table of a valid text stands."""

    _TOKEN = re.compile(
        r"[ \t\r]+|\#[^\n]*"  # nothing
        r'|"""(?:\\.|[^\\])*?"""(?:"{0,2})|' + r"'''.*?'''(?:'{0,2})"
        r'|"(?:\\.|[^"\\])*"|' + r"'[^'\n]*'"
        r"|[A-Za-z0-9_-]+|.",
        re.DOTALL,
    )

    def __init__(self, text: str, is_json: bool) -> None:
        self.line_of: dict[_Path, int] = {}
        self.repeated: list[tuple[_Path, int]] = []
        """Keys given again: in JSON, which allows that."""
        self._tokens: list[tuple[str, int]] = []
        line = 1
        for token in self._TOKEN.findall(text):
            if not token.startswith((" ", "\t", "\r", "#")):
                self._tokens.append((token, line))
            line += token.count("\n")
        self._tokens.append(("", line))
        self._at = 0
        self._separator = ":" if is_json else "="
        if is_json:
            self._value(())
        else:
            self._toml()

    def _peek(self) -> str:
        return self._tokens[self._at][0]

    def _next(self) -> None:
        self._at = min(self._at + 1, len(self._tokens) - 1)

    def _line(self) -> int:
        return self._tokens[self._at][1]

    def _record(self, path: _Path, line: int) -> None:
        if path in self.line_of:
            self.repeated.append((path, line))
        self.line_of[path] = line

    def _toml(self) -> None:
        table: _Path = ()
        counts: dict[_Path, int] = {}  # of the arrays of tables
        while token := self._peek():
            if token == "\n":
                self._next()
            elif token == "[":
                table = self._header(counts)
            else:
                self._pair(table)

    def _header(self, counts: dict[_Path, int]) -> _Path:
        line = self._line()
        self._next()
        is_array = self._peek() == "["
        keys = self._keys("]")
        while self._peek() == "]":
            self._next()
        path: _Path = ()
        for index, key in enumerate(keys):
            path += (key,)
            if is_array and index == len(keys) - 1:
                counts[path] = counts.get(path, 0) + 1
            self.line_of.setdefault(path, line)
            if path in counts:
                path += (counts[path] - 1,)
        self.line_of[path] = line
        return path

    def _keys(self, end: str) -> list[str]:
        """The parts of a dotted key, up to and without `end`."""
        keys = []
        while (token := self._peek()) not in (end, ""):
            if token not in ("[", ".", "\n"):
                keys.append(_unquoted(token))
            self._next()
        return keys

    def _pair(self, table: _Path) -> None:
        line = self._line()
        path = (*table, *self._keys(self._separator))
        self._record(path, line)
        self._next()
        self._value(path)

    def _value(self, path: _Path) -> None:
        while self._peek() == "\n":
            self._next()
        opening = self._peek()
        if opening not in ("{", "["):
            while self._peek() not in (",", "]", "}", "\n", ""):
                self._next()
            return
        self._next()
        index = 0
        while (token := self._peek()) not in ("]", "}", ""):
            if token in (",", "\n"):
                self._next()
            elif opening == "{":
                self._pair(path)
            else:
                self._record((*path, index), self._line())
                self._value((*path, index))
                index += 1
        self._next()


def _unquoted(token: str) -> str:
    try:
        return str(json.loads(token)) if token.startswith('"') else token.strip("'")
    except ValueError:  # an escape that only TOML knows
        return token.strip('"')
