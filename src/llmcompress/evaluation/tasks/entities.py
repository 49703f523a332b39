"""Entities in the tags of words: who begins, who goes on, who ends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

OUTSIDE = "O"
_IN_SCHEME = re.compile(r"O|[BIES]-.+")


def is_scheme(names: Iterable[str]) -> bool:
    """Whether tags tell where entities begin and end: all are O, or begin with B-, I-, E- or S-.

    Example:
        >>> is_scheme(["O", "B-PER", "I-PER"]), is_scheme(["NOUN", "VERB"])
        (True, False)
    """
    return all(_IN_SCHEME.fullmatch(name) for name in names)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the entities in BIO or BIOES tags, as (type, first word, last word), by the rules of conlleval.

    I- and E- continue an entity of their own type that B- or I- has opened; every other tag but O begins a new one.

    Example:
        >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "S-ORG", "E-ORG"]))
        [('LOC', 3, 3), ('LOC', 4, 4), ('ORG', 5, 5), ('ORG', 6, 6), ('PER', 0, 1)]
    """
    found: list[tuple[str, int, int]] = []
    before, kind_before = OUTSIDE, ""
    for index, tag in enumerate(tags):
        place, _, kind = tag.partition("-")
        if place in ("I", "E") and before in ("B", "I") and kind == kind_before:
            found[-1] = (kind, found[-1][1], index)
        elif place in ("B", "I", "E", "S"):
            found.append((kind, index, index))
        before, kind_before = place, kind
    return set(found)
