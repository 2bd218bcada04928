"""Rates and latencies as people write them: "500 Mbit/s", "50 us"; plain numbers are bit/s and seconds."""

from __future__ import annotations

import math
import re

_NUMBER = r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*"
# Mega, whatever its case, since nothing else can be meant; but B for bytes is another unit, and refused.
_RATE = re.compile(_NUMBER + r"([kKmMgGtT]?)(?:[bB]it(?:/s|ps)?|bps|b/s)\s*")
_LATENCY = re.compile(_NUMBER + r"(s|ms|us|µs|μs|ns)\s*")
_RATE_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_LATENCY_DIVISORS = {"s": 1.0, "ms": 1e3, "us": 1e6, "µs": 1e6, "μs": 1e6, "ns": 1e9}  # exact, as 1e-6 is not


def parse_rate(value: object) -> float:
    """Bits a second. Raises ValueError."""
    rate = _number(value)
    if isinstance(value, str) and (found := _RATE.fullmatch(value)):
        rate = float(found[1]) * _RATE_SCALES[found[2].lower()]
    if not rate > 0:
        raise ValueError(f'{value!r}, expected a rate above 0, as "500 Mbit/s" (kbit, Mbit, Gbit) or in bit/s')
    return rate


def parse_latency(value: object) -> float:
    """Seconds. Raises ValueError."""
    latency = _number(value)
    if isinstance(value, str) and (found := _LATENCY.fullmatch(value)):
        latency = float(found[1]) / _LATENCY_DIVISORS[found[2]]
    if not 0 <= latency < math.inf:
        raise ValueError(f'{value!r}, expected a time of at least 0, as "50 us" (s, ms, us, ns) or in seconds')
    return latency


def _number(value: object) -> float:
    """NAN for what is none."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int beyond every float
        return math.nan


def format_rate(rate: float) -> str:
    """Four digits: for people."""
    if math.isinf(rate):
        return "of unknown rate"
    prefix = next((prefix for prefix in "TGMk" if rate >= _RATE_SCALES[prefix.lower()]), "")
    return f"{rate / _RATE_SCALES[prefix.lower()]:.4g} {prefix}bit/s"


def format_latency(latency: float) -> str:
    """Four digits: for people."""
    unit = next((unit for unit in ("s", "ms", "us") if latency * _LATENCY_DIVISORS[unit] >= 1), "ns")
    return f"{latency * _LATENCY_DIVISORS[unit]:.4g} {unit}"


def shortest_rate(rate: float) -> str | float:
    """What reads best and comes back the same."""
    text = format_rate(rate)
    return text if parse_rate(text) == rate else rate


def shortest_latency(latency: float) -> str | float:
    """What reads best and comes back the same."""
    text = format_latency(latency)
    return text if parse_latency(text) == latency else latency
