"""The vocabulary of a fast tokenizer: which of its tokens cannot go, and the same tokenizer with fewer of them.

A fast tokenizer is one JSON document (`Tokenizer.to_str()`): vocabulary, merges or scores, added tokens, templates.
Tokens are dropped there, all ids move together, and transformers reads the tokenizer back from a folder as it would
for any user: what is returned is what will be loaded later.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UnsupportedModelError
from .merges import Merges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Alphabet = Literal["all", "seen", "none"]

_KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")


class FastVocabulary:
    """The tokens of a fast tokenizer, and how they hang together. It never changes the tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Raises:
        UnsupportedModelError: a tokenizer that is not fast, or splits at random.

    Example:
        >>> from llmcompress.testing import tiny_tokenizer
        >>> vocabulary = FastVocabulary(tiny_tokenizer())
        >>> vocabulary.kind, len(vocabulary.tokens), sorted(vocabulary.fixed)
        ('WordLevel', 128, [0, 1, 2, 3])
        >>> vocabulary.keep([0, 1, 2, 3, 37])("A b")["input_ids"]
        [4, 1, 1]
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        who = type(tokenizer).__name__
        if backend is None or not hasattr(backend, "to_str"):
            raise UnsupportedModelError(
                f"VocabularyPruning.tokenizer must be a fast tokenizer (one with a tokenizer.json), got {who}; load it "
                f"with AutoTokenizer.from_pretrained(...), or convert it with "
                f"transformers.convert_slow_tokenizer.convert_slow_tokenizer and PreTrainedTokenizerFast."
            )
        self._tokenizer = tokenizer
        self._content: dict[str, Any] = json.loads(backend.to_str())
        model = self._content["model"]
        self.kind: str = model["type"]
        if self.kind not in _KINDS:
            raise UnsupportedModelError(f"{who} must be of a kind in {', '.join(_KINDS)}, got {self.kind!r}.")
        if model.get("dropout"):
            raise UnsupportedModelError(
                f"{who} must split texts the same way each time, got BPE dropout {model['dropout']}; set "
                f"tokenizer.backend_tokenizer.model.dropout = None."
            )
        words = enumerate(token for token, _ in model["vocab"]) if self.kind == "Unigram" else None
        self._model_ids: dict[str, int] = (
            {token: index for index, token in words} if words is not None else dict(model["vocab"])
        )
        added = {entry["content"]: int(entry["id"]) for entry in self._content["added_tokens"]}
        self.tokens: dict[int, str] = {index: token for token, index in (*self._model_ids.items(), *added.items())}
        self._ids = {token: index for index, token in self.tokens.items()}

    @cached_property
    def fixed(self) -> set[int]:
        """Tokens that stay whatever the texts hold: added and special ones, the unknown one, those of templates."""
        model = self._content["model"]
        found = {int(entry["id"]) for entry in self._content["added_tokens"]}
        found.update(index for index in self._tokenizer.all_special_ids if index in self.tokens)
        found.update(_template_ids(self._content["post_processor"]))
        if self._content["padding"]:
            found.add(int(self._content["padding"]["pad_id"]))
        if self.kind == "Unigram":
            # Unknown characters cost the lowest score and a constant: without that token they would cost less.
            scores = [score for _, score in model["vocab"]]
            found.add(scores.index(min(scores)))
            if model["unk_id"] is not None:
                found.add(int(model["unk_id"]))
        elif model.get("unk_token") in self._ids:
            found.add(self._ids[model["unk_token"]])
        return found

    def alphabet(self, which: Alphabet, seen: Collection[int]) -> set[int]:
        """Return the tokens out of which any text can be built: all bytes, or single characters.

        Args:
            which: all characters, only those that occur in `seen` tokens, or none. Bytes are taken all or none.
            seen: tokens of the texts.
        """
        if which == "none" or self.kind == "WordLevel":
            return set()
        if self.kind in ("BPE", "Unigram") and self._content["model"].get("byte_fallback"):
            names = {f"<0x{byte:02X}>" for byte in range(256)}
            return {index for token, index in self._model_ids.items() if token in names}
        bare = {index: self._bare(token) for token, index in self._model_ids.items()}
        single = {index for index, token in bare.items() if len(token) == 1}
        if which == "all" or _has(self._content["pre_tokenizer"], "ByteLevel"):
            return single
        characters = {character for index in seen for character in bare.get(index, "")}
        return {index for index in single if bare[index] in characters}

    def parts(self, token: int) -> set[int]:
        """Return the tokens that must be there for `token` to be built; itself, where it needs no others."""
        if self._merges is None or token not in self.tokens or self.tokens[token] not in self._model_ids:
            return {token}
        return {token, *(self._ids[piece] for piece in self._merges.pieces(self.tokens[token]) if piece in self._ids)}

    def attempts(self, text: str) -> set[int]:
        """Return the tokens that the encoder finds in words it gives up on, as WordPiece does with an unknown end.

        They are in no output, and without them the encoder might find another way through the word.
        """
        if self.kind != "WordPiece":
            return set()
        backend: Any = self._tokenizer.backend_tokenizer
        normal = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
        splits = backend.pre_tokenizer.pre_tokenize_str(normal) if backend.pre_tokenizer is not None else [(normal, ())]
        prefix = self._content["model"]["continuing_subword_prefix"]
        found = set()
        for word, _ in splits:
            at = 0
            while at < len(word):
                pieces = ((prefix if at else "") + word[at:end] for end in range(len(word), at, -1))
                piece = next((piece for piece in pieces if piece in self._model_ids), None)
                if piece is None:
                    break
                found.add(self._model_ids[piece])
                at += len(piece) - (len(prefix) if at else 0)
        return found

    def keep(self, kept: Sequence[int]) -> PreTrainedTokenizerBase:
        """Return the same tokenizer with the tokens `kept` alone; the n-th of these (ascending) ids becomes n.

        Ids without a token (rows of the model that only its config names) are passed over.

        Raises:
            UnsupportedModelError: its added tokens stand where the new numbering cannot put them, or its class does not
                read its own folder back.
        """
        places = {token: place for place, token in enumerate(kept)}
        content = json.loads(json.dumps(self._content))
        self._keep_model(content["model"], places)
        for entry in content["added_tokens"]:
            entry["id"] = places[int(entry["id"])]
        content["added_tokens"].sort(key=lambda entry: entry["id"])
        _move_template(content["post_processor"], places)
        if content["padding"]:
            content["padding"]["pad_id"] = places[int(content["padding"]["pad_id"])]
        new = self._read_back(json.dumps(content, ensure_ascii=False))
        ids = new.get_vocab()
        wrong = next((t for i, t in self.tokens.items() if i in places and ids.get(t) != places[i]), None)
        if wrong is not None or len(ids) > len(places):
            raise UnsupportedModelError(
                f"{type(self._tokenizer).__name__} cannot be renumbered: "
                + (f"{wrong!r} has the id {ids.get(wrong)}" if wrong is not None else f"it has {len(ids)} tokens")
                + f" where {len(places)} tokens were kept; save it as a plain PreTrainedTokenizerFast first."
            )
        return new

    @cached_property
    def _merges(self) -> Merges | None:
        model = self._content["model"]
        if self.kind != "BPE":
            return None
        table = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
        prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
        return Merges(table, prefix=prefix, suffix=suffix)

    def _bare(self, token: str) -> str:
        """Return a token without the marks of its place in a word."""
        model = self._content["model"]
        prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        # A lone mark is a character (or several) of its own.
        return token.removeprefix(prefix).removesuffix(suffix) or token

    def _keep_model(self, model: dict[str, Any], places: dict[int, int]) -> None:
        if self.kind == "Unigram":
            model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in places]
            model["unk_id"] = None if model["unk_id"] is None else places[int(model["unk_id"])]
            return
        model["vocab"] = {token: places[index] for token, index in model["vocab"].items() if index in places}
        if self._merges is not None:
            stays = model["vocab"]
            model["merges"] = [
                list(merge)
                for merge in self._merges.table
                if merge[0] in stays and merge[1] in stays and self._merges.join(merge) in stays
            ]

    def _read_back(self, content: str) -> PreTrainedTokenizerBase:
        with tempfile.TemporaryDirectory(prefix="llmcompress-") as folder:
            self._tokenizer.save_pretrained(folder)
            file = Path(folder) / "tokenizer.json"
            if not file.is_file():
                raise UnsupportedModelError(
                    f"{type(self._tokenizer).__name__} must save a tokenizer.json, and does not; load it with "
                    f"AutoTokenizer, or wrap its backend in PreTrainedTokenizerFast."
                )
            file.write_text(content, encoding="utf-8")
            new = type(self._tokenizer).from_pretrained(folder, local_files_only=True)
        new.name_or_path = self._tokenizer.name_or_path
        new.init_kwargs["name_or_path"] = self._tokenizer.name_or_path
        return new


def _template_ids(processor: Any) -> set[int]:
    """Return the token ids that a post-processor puts in."""
    found: set[int] = set()
    if isinstance(processor, dict):
        for entry in (processor.get("special_tokens") or {}).values():
            found.update(entry["ids"])
        found.update(int(processor[name][1]) for name in ("sep", "cls") if name in processor)
        for inner in processor.get("processors", ()):
            found |= _template_ids(inner)
    return found


def _move_template(processor: Any, places: dict[int, int]) -> None:
    if not isinstance(processor, dict):
        return
    for entry in (processor.get("special_tokens") or {}).values():
        entry["ids"] = [places[index] for index in entry["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name] = [processor[name][0], places[int(processor[name][1])]]
    for inner in processor.get("processors", ()):
        _move_template(inner, places)


def _has(part: Any, kind: str) -> bool:
    """Tell whether a pre-tokenizer is of this kind, or one of its parts is."""
    if not isinstance(part, dict):
        return False
    return part["type"] == kind or any(_has(inner, kind) for inner in part.get("pretokenizers", ()))
