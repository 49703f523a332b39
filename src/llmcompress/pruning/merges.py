"""Byte-pair merges: which pieces a token is built from on its way, so that none of them is lost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

Merge = tuple[str, str]


class Merges:
    """The merge table of a byte-pair encoding.

    Args:
        table: the merges, the first to be made first.
        prefix: what marks a piece that continues a word (`"##"`), or `""`.
        suffix: what marks a piece that ends a word (`"</w>"`), or `""`.

    Example:
        >>> merges = Merges([("a", "t"), ("c", "at"), ("s", "at")])
        >>> merges.join(("c", "at")), sorted(merges.pieces("cat")), sorted(merges.pieces("on"))
        ('cat', ['a', 'at', 'c', 'cat', 't'], ['n', 'o'])
    """

    def __init__(self, table: Sequence[Merge], *, prefix: str = "", suffix: str = "") -> None:
        self.table = table
        self._prefix, self._suffix = prefix, suffix
        self._rank = {merge: rank for rank, merge in enumerate(table)}

    def join(self, merge: Merge) -> str:
        """Return the token that a merge makes."""
        return merge[0] + merge[1][len(self._prefix) :]

    def pieces(self, token: str) -> set[str]:
        """Return every piece that stands for a while when the encoder builds `token` out of its characters.

        Within any word the encoder builds a token just as it builds it alone: merges across its borders would have made
        another token. So a vocabulary that keeps these pieces, and the merges between them in their order, splits as
        before each text whose tokens it keeps.
        """
        parts = self._characters(token)
        seen = set(parts)
        while len(parts) > 1:
            ranks = [self._rank.get(pair, len(self._rank)) for pair in itertools.pairwise(parts)]
            best = min(ranks)
            if best == len(self._rank):
                break
            at = ranks.index(best)
            parts[at : at + 2] = [self.join((parts[at], parts[at + 1]))]
            seen.add(parts[at])
        return seen

    def _characters(self, token: str) -> list[str]:
        body, ends = token, ""
        if self._suffix and token.endswith(self._suffix):
            body, ends = token[: -len(self._suffix)], self._suffix
        starts = ""
        if self._prefix and body.startswith(self._prefix):
            body, starts = body[len(self._prefix) :], self._prefix
        characters = [self._prefix + character for character in body]
        if characters:
            characters[0] = starts + body[0]
            characters[-1] += ends
        return characters or [token]
