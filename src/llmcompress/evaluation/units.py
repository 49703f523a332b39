"""Numbers as people read them: bytes, counts, ratios, scores; and as JSON can hold them."""

from __future__ import annotations

import math
from typing import Any


def bytes_text(count: float) -> str:
    """Write bytes in decimal units, three digits.

    Example:
        >>> bytes_text(90_868_376), bytes_text(512)
        ('90.9 MB', '512 B')
    """
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"), " ")


def count_text(count: float) -> str:
    """Write a count with three digits.

    Example:
        >>> count_text(22_713_216), count_text(7e159), count_text(math.inf)
        ('22.7 M', '7e+159', 'inf')
    """
    if abs(count) >= 999.5e12:
        return f"{count:.3g}"
    return _scaled(count, ("", "k", "M", "B", "T"), " ").rstrip()


def ratio_text(ratio: float) -> str:
    """Write a ratio with two digits below ten.

    Example:
        >>> ratio_text(3.94), ratio_text(0.412), ratio_text(12.3)
        ('3.9x', '0.41x', '12x')
    """
    if not math.isfinite(ratio):
        return "-"
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x" if ratio >= 0.95 else f"{ratio:.2f}x"


def milliseconds_text(value: float) -> str:
    """Write milliseconds with three digits.

    Example:
        >>> milliseconds_text(19.23), milliseconds_text(552.4)
        ('19.2 ms', '552 ms')
    """
    return f"{_three_digits(value)} ms"


def seconds_text(value: float) -> str:
    """Write a time as people do, with two digits at most.

    Example:
        >>> seconds_text(0.02), seconds_text(42.4), seconds_text(600), seconds_text(9000)
        ('<1 s', '42 s', '10 min', '2.5 h')
    """
    if value < 0.95:
        return "<1 s"
    if value < 100:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def percent_text(share: float) -> str:
    """Write a share of [0, 1] in per cent.

    Example:
        >>> percent_text(0.8853)
        '88.5 %'
    """
    return f"{100 * share:.1f} %"


def score_text(value: float, *, fraction: bool) -> str:
    """Write a score: per cent with one digit if it is a fraction, else four significant digits.

    Example:
        >>> score_text(0.8853, fraction=True), score_text(2.0789, fraction=False)
        ('88.5 %', '2.079')
    """
    return percent_text(value) if fraction else f"{value:.4g}"


def change_text(value: float, base: float, *, fraction: bool) -> str:
    """Write the change of a score: in points if it is a fraction, else in per cent of the base.

    Example:
        >>> change_text(0.882, 0.885, fraction=True), change_text(2.2, 2.0, fraction=False)
        ('-0.3 points', '+10.0 %')
    """
    if fraction:
        return f"{100 * (value - base):+.1f} points".replace("-0.0", "+0.0")
    return f"{100 * (value / base - 1):+.1f} %".replace("-0.0 ", "+0.0 ") if base else "-"


def json_numbers(value: Any) -> Any:
    """Return plain dicts and lists with words for the numbers that JSON has not; pydantic reads them as floats again.

    Example:
        >>> json_numbers({"pearson": math.nan, "ends": [0.5, -math.inf]})
        {'pearson': 'NaN', 'ends': [0.5, '-Infinity']}
    """
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: json_numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [json_numbers(one) for one in value]
    return value


def _scaled(count: float, units: tuple[str, ...], space: str) -> str:
    step = 0
    # 999.5 would be rounded up to 1000 of the unit below.
    while abs(count) >= 999.5 and step < len(units) - 1:
        count, step = count / 1000, step + 1
    return f"{count:.0f}{space}{units[step]}" if step == 0 else f"{_three_digits(count)}{space}{units[step]}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
