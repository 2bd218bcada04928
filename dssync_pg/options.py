"""What can be chosen: `dssync_pg.Options`, given as `pg_options`, or DSSYNC_<NAME> in the environment."""

from __future__ import annotations

import dataclasses
import difflib
import json
import operator
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from .plan import Plan

Value: TypeAlias = int | str | bool

_PREFIX = "DSSYNC_"
_NOT_OPTIONS = ("DSSYNC_WERROR", "DSSYNC_SOCKET_IFNAME")
"""Variables with our prefix that mean something elsewhere: to the build; the network interface, which ranks may have different."""


class _Field:
    """How the value of one option is read and checked."""

    def __init__(self, default: Value, allowed: str, accept: Callable[[Any], Value]) -> None:
        self.default = default
        self.allowed = allowed  # in words, for errors
        self.accept = accept  # gives the value back in its own type; raises TypeError or ValueError

    def from_text(self, text: str) -> Value:
        """The value that an environment variable spells."""
        if isinstance(self.default, bool):
            return self.accept(_SPELLED_BOOLS[text.strip().lower()])
        try:
            return self.accept(int(text))
        except ValueError:
            return self.accept(text.strip())


_SPELLED_BOOLS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _integer(least: int, most: int, default: Value, or_word: str | None = None) -> _Field:
    def accept(value: Any) -> Value:
        if or_word is not None and value == or_word:
            return or_word
        if isinstance(value, bool | str):
            raise TypeError
        number = operator.index(value)
        if not least <= number <= most:
            raise ValueError
        return number

    limits = f"an integer from {least} to {most}" if most < 1 << 32 else f"an integer, at least {least}"
    return _Field(default, limits if or_word is None else f'"{or_word}" or {limits}', accept)


def _word(*words: str) -> _Field:
    def accept(value: Any) -> Value:
        if value not in words:
            raise ValueError
        return str(value)

    return _Field(words[0], "one of " + ", ".join(f'"{word}"' for word in words), accept)


def _plan(*words: str) -> _Field:
    def accept(value: Any) -> Any:
        from .plan import Plan  # late: options are read before anything is loaded

        if not isinstance(value, Plan) and value not in words:
            raise ValueError
        return value

    return _Field(words[0], "a Plan or one of " + ", ".join(f'"{word}"' for word in words), accept)


def _text(default: str, allowed: str) -> _Field:
    def accept(value: Any) -> Value:
        if not isinstance(value, str) or not value:
            raise TypeError
        return value

    return _Field(default, allowed, accept)


def _boolean(default: bool) -> _Field:
    def accept(value: Any) -> Value:
        if not isinstance(value, bool):
            raise TypeError
        return value

    return _Field(default, "True or False (in the environment 1 or 0)", accept)


_FIELDS: dict[str, _Field] = {
    "group_size": _integer(2, 1 << 24, "auto", or_word="auto"),
    "plan": _plan("auto", "grid", "random", "exact", "leaders", "striped", "hybrid"),
    "topology": _text("auto", '"auto", "flat" or the name of a file'),
    "seed": _integer(0, (1 << 64) - 1, 0),
    "max_period": _integer(1, 1024, 8),
    "warmup_steps": _integer(0, (1 << 63) - 1, 0),
    "average_state": _word("none", "v", "all"),
    "all_reduce": _word("avg", "exact"),
    "min_bytes": _integer(0, (1 << 63) - 1, 1024),
    "auto_attach": _boolean(True),
    "replan_steps": _integer(10, 1 << 31, 50, or_word="never"),
    "engine": _word("auto", "native", "gloo"),
    "transport": _word("auto", "shm", "tcp"),
}

_UNSET: Any = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What can be chosen for a dssync group: `init_process_group("dssync", pg_options=Options(...))`.

    An argument wins over the variable DSSYNC_<NAME> of the environment, and that over the default. All ranks must end up with the
    same values; a difference is an error on each of them. Raises ValueError or TypeError for values that cannot be and for names,
    of arguments and of DSSYNC_ variables, that do not exist.
    """

    group_size: int | Literal["auto"] = _UNSET
    """Workers that average together; "auto": pairs while 3 rounds make all agree, else the smallest size that needs at most 3."""
    plan: str | Plan = _UNSET
    """How groups are formed: a kind, see `Plan.create`, or a Plan made by hand."""
    topology: str = _UNSET
    """What the network is like: the name of a file (see `Topology`); "auto": what Slurm says, or, where ranks are on several hosts,
    what a probe at the start measures; "flat": nothing is known, and nothing is measured."""
    seed: int = _UNSET
    """Of the shuffles."""
    max_period: int = _UNSET
    """Most rounds (steps) until the groups repeat. Default 8."""
    warmup_steps: int = _UNSET
    """So many first steps average over all ranks. Default 0; 5 to 10 % of a training removes over half of SGD's remaining gap."""
    average_state: Literal["none", "v", "all"] = _UNSET
    """Optimizer state that is averaged with the parameters: nothing, the second moments (an eighth a step), or all of it."""
    all_reduce: Literal["avg", "exact"] = _UNSET
    """"exact": every collective of the group is exact, and no model is attached."""
    min_bytes: int = _UNSET
    """AVG all_reduces of tensors smaller than this are exact. Default 1024 bytes."""
    auto_attach: bool = _UNSET
    """Whether DDP models on the group average their parameters by themselves. Default True."""
    replan_steps: int | Literal["never"] = _UNSET
    """So often, where the topology is known, rank 0 looks whether links have become slower or faster and plans anew. Default 50."""
    engine: Literal["auto", "native", "gloo"] = _UNSET
    """What carries averages, all_reduces and barriers: "native" (shared memory and TCP, in C), or "gloo"; "auto" is native where
    every rank can have it."""
    transport: Literal["auto", "shm", "tcp"] = _UNSET
    """Of the native engine: "auto" is shared memory between ranks of one host and TCP between hosts; the others take only that."""

    def __new__(cls, *args: Any, **named: Any) -> Options:
        if args:
            raise TypeError(f"dssync: Options takes its values by name; got {args[0]!r} without one")
        for name in named:
            if name not in _FIELDS:
                raise TypeError(f"dssync: Options has no {name!r}{_did_you_mean(name, _FIELDS)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _refuse_unknown_variables()
        for name, field in _FIELDS.items():
            object.__setattr__(self, name, _resolve(name, field, getattr(self, name)))
        if self.engine == "gloo" and self.transport == "shm":
            raise ValueError('dssync: engine="gloo" has no transport="shm"; take engine="native", or leave transport at "auto"')

    def to_json(self) -> str:
        """All values in one canonical line: equal exactly when the options are."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(values, sort_keys=True, default=lambda plan: plan.to_bytes().hex())


def _resolve(name: str, field: _Field, argument: Any) -> Value:
    variable = _PREFIX + name.upper()
    if argument is not _UNSET:
        try:
            return field.accept(argument)
        except (TypeError, ValueError) as error:
            raise type(error)(f"dssync: Options({name}={argument!r}): must be {field.allowed}") from None
    text = os.environ.get(variable)
    if text is None:
        return field.default
    try:
        return field.from_text(text)
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"dssync: {variable}={text!r} in the environment: must be {field.allowed}") from None


def variable(name: str) -> str:
    """Of the environment, "" if not set. Bytes that are no text come as escapes: these can be passed on, and name nothing."""
    return os.environ.get(name, "").encode(errors="backslashreplace").decode()


def _refuse_unknown_variables() -> None:
    known = [*(_PREFIX + name.upper() for name in _FIELDS), *_NOT_OPTIONS]
    for variable in sorted(os.environ):
        if variable.startswith(_PREFIX) and variable not in known:
            raise ValueError(
                f"dssync: {variable}={os.environ[variable]!r} in the environment names no option{_did_you_mean(variable, known)}"
            )


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"
