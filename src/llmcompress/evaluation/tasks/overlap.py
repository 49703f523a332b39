"""How much a text shares with its references: ROUGE, BLEU and chrF, as their reference implementations count it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError, MissingInputError
from ..resampling import Floats, Metrics

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_BLEU_ORDER = 4
_CHRF_BETA = 2

References = Sequence[Sequence[str]]
"""For each text its references; their number may differ."""


def rouge_scorer(*, stemmer: bool) -> RougeScorer:
    """Return the scorer of the package rouge-score for ROUGE-1, ROUGE-2 and ROUGE-L.

    Raises:
        MissingInputError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("ROUGE", "rouge-score", error) from error
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer)


def rouge(scorer: RougeScorer, text: str, references: Sequence[str]) -> dict[str, float]:
    """Return the F-measures of `text`, in [0, 1], each against the reference that it is highest with.

    Example:
        >>> found = rouge(rouge_scorer(stemmer=False), "the cat sat", ["the cat sat down", "a dog"])
        >>> {name: round(value, 4) for name, value in found.items()}
        {'rouge1': 0.8571, 'rouge2': 0.8, 'rougeL': 0.8571}
    """
    return {name: float(score.fmeasure) for name, score in scorer.score_multi(list(references), text).items()}


def bleu(texts: Sequence[str], references: References, *, tokenize: str = "13a") -> tuple[Metrics, str]:
    """Return corpus BLEU (Papineni et al. 2002) as a function of how often each text counts, and its signature.

    Each text's counts are sacrebleu's; their sums are scored as sacrebleu does (Post 2018,
    https://aclanthology.org/W18-6319), in [0, 100], with its exponential smoothing.

    Args:
        texts: what was generated.
        references: what was hoped for.
        tokenize: how sacrebleu cuts words: "13a", "intl", "char", "zh", ...

    Raises:
        MissingInputError: sacrebleu is not installed.
        ConfigError: sacrebleu has no such way to cut words.

    Example:
        >>> import numpy as np
        >>> score, signature = bleu(["the cat sat on the mat"], [["the cat sat on a mat"]])
        >>> round(float(score(np.ones((1, 1)))["bleu"][0]), 4), "tok:13a" in signature
        (53.7285, True)
    """
    known = _sacrebleu().BLEU.TOKENIZERS
    if tokenize not in known:
        raise ConfigError(f"BLEU's tokenize must be one of {', '.join(known)}, got {tokenize!r}.")
    scorer = _sacrebleu().BLEU(tokenize=tokenize)
    table, signature = _statistics(scorer, texts, references)

    def metrics(counts: Floats) -> dict[str, Floats]:
        sums = counts @ table
        length, reference = sums[:, 0], sums[:, 1]
        correct, total = sums[:, 2 : 2 + _BLEU_ORDER], sums[:, 2 + _BLEU_ORDER :]
        with np.errstate(divide="ignore", invalid="ignore"):
            penalty = np.where(length < reference, np.exp(1 - reference / length), 1.0)
            # An order without a match counts as half a match, a quarter where it is the second, and so on.
            smooth = 2.0 ** -np.cumsum(correct == 0, axis=1)
            logs = np.log(np.where(correct > 0, correct, smooth) / total)
            score = 100 * penalty * np.exp(logs.mean(1))
        return {"bleu": np.where((correct > 0).any(1) & (total > 0).all(1), score, 0.0)}

    return metrics, signature


def chrf(texts: Sequence[str], references: References) -> tuple[Metrics, str]:
    """Return corpus chrF2 (Popović 2015) as a function of how often each text counts, and its signature.

    Each text's counts are sacrebleu's, against the reference it has the highest F with; in [0, 100].

    Example:
        >>> import numpy as np
        >>> score, signature = chrf(["the cat sat on the mat"], [["the cat sat on a mat"]])
        >>> round(float(score(np.ones((1, 1)))["chrf"][0]), 4), "nc:6|nw:0" in signature
        (72.0848, True)
    """
    scorer = _sacrebleu().CHRF(beta=_CHRF_BETA)
    table, signature = _statistics(scorer, texts, references)

    def metrics(counts: Floats) -> dict[str, Floats]:
        given, wanted, shared = np.moveaxis((counts @ table).reshape(len(counts), -1, 3), 2, 0)
        counted = (given > 0) & (wanted > 0)
        orders = counted.sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.where(counted, shared / given, 0.0).sum(1) / orders
            recall = np.where(counted, shared / wanted, 0.0).sum(1) / orders
            score = (1 + _CHRF_BETA**2) * precision * recall / (_CHRF_BETA**2 * precision + recall)
        return {"chrf": np.where((orders > 0) & (precision + recall > 0), 100 * score, 0.0)}

    return metrics, signature


def _statistics(scorer: Any, texts: Sequence[str], references: References) -> tuple[Floats, str]:
    # sacrebleu wants one list for each first, second, ... reference, with None where a text has fewer.
    streams = [list(stream) for stream in zip_longest(*references)]
    counts = scorer._extract_corpus_statistics(list(texts), streams)
    return np.asarray(counts, float), str(scorer.get_signature())


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise _missing("BLEU and chrF", "sacrebleu", error) from error
    return metrics


def _missing(what: str, package: str, error: ImportError) -> MissingInputError:
    return MissingInputError(f"{what} needs the package {package} ({error}); run: pip install 'llmcompress[eval]'.")
