"""A comparison as a flat table of numbers, one row a model: for CSV and pandas."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from ..errors import MissingInputError
from ..evaluation.statistics import PairedTest
from ..evaluation.tasks import TaskScore

if TYPE_CHECKING:
    import pandas

    from ..comparison import Comparison, Entry

Value = str | int | float | bool | None


def rows(comparison: Comparison) -> list[dict[str, Value]]:
    """Return one dict a model, all with the same keys; None where a number was not measured.

    Metrics are named by themselves (`accuracy`, `accuracy_low`, `accuracy_change`, `accuracy_p_holm`), and with
    several tasks after `task/`. Shares are in [0, 1], times in milliseconds, sizes in bytes. A change is the model's
    value minus the base's, or over it where the metric is compared by ratio (a perplexity: above 1 is higher than the
    base's); `smaller_...` and `speedup...` are the base's over the model's.
    """
    found = [_row(comparison, entry) for entry in comparison.entries]
    keys = dict.fromkeys(key for row in found for key in row)
    return [{key: row.get(key) for key in keys} for row in found]


def to_csv(comparison: Comparison) -> str:
    """Return `rows` as CSV with a header line."""
    found = rows(comparison)
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


def to_dataframe(comparison: Comparison) -> pandas.DataFrame:
    """Return `rows` as a data frame.

    Raises:
        MissingInputError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingInputError(
            "to_dataframe() needs pandas, which is not installed; do pip install pandas, or take to_csv()."
        ) from error
    return pandas.DataFrame(rows(comparison))


def _row(comparison: Comparison, entry: Entry) -> dict[str, Value]:
    evaluation, change = entry.evaluation, entry.change
    row: dict[str, Value] = {"name": entry.name, "is_base": change is None, "model": evaluation.model}
    for task, (prefix, score) in enumerate(zip(_prefixes(evaluation.scores), evaluation.scores, strict=True)):
        tests = {test.metric: test for test in change.tests[task]} if change else {}
        for name, value in score.metrics.items():
            row[f"{prefix}{name}"] = value
            row[f"{prefix}{name}_low"], row[f"{prefix}{name}_high"] = score.intervals.get(name, (None, None))
            row |= _test(f"{prefix}{name}", tests.get(name))
        flip = change.flips[task] if change else None
        row[f"{prefix}right_to_wrong"] = flip.right_to_wrong if flip else None
        row[f"{prefix}wrong_to_right"] = flip.wrong_to_right if flip else None
        fidelity = change.fidelity[task] if change else None
        for name in ("kl_mean", "kl_median", "kl_p99", "top1_agreement", "cosine"):
            row[f"{prefix}{name}"] = fidelity.model_dump()[name] if fidelity else None
    row |= {
        "parameters": evaluation.size.parameters,
        "nonzero": evaluation.size.nonzero,
        "memory_bytes": evaluation.size.memory_bytes,
        "disk_bytes": evaluation.size.disk_bytes,
        "sparse_bytes_theoretical": evaluation.size.sparse_bytes,
        "smaller_on_disk": change.smaller_on_disk if change else 1.0,
        "smaller_in_memory": change.smaller_in_memory if change else 1.0,
        "flops": evaluation.flops.count if evaluation.flops else None,
    }
    for number, found in enumerate(evaluation.latency):
        shape = f"{found.batch_size}x{found.tokens}"
        faster = change.faster[number] if change else None
        row |= {
            f"latency_ms_{shape}": found.median_ms,
            f"latency_p90_ms_{shape}": found.p90_ms,
            f"latency_p99_ms_{shape}": found.p99_ms,
            f"tokens_per_second_{shape}": found.tokens_per_second,
            f"speedup_{shape}": faster.ratio if faster else 1.0,
            f"speedup_low_{shape}": faster.low if faster else None,
            f"speedup_high_{shape}": faster.high if faster else None,
            f"joules_{shape}": found.energy.joules if found.energy else None,
        }
    for number, written in enumerate(evaluation.generation):
        shape = f"{written.batch_size}x({written.prompt_tokens}+{written.new_tokens})"
        gained = change.generation[number] if change else None
        row |= {
            f"first_token_ms_{shape}": written.first_token_ms,
            f"token_ms_{shape}": written.token_ms,
            f"generated_tokens_per_second_{shape}": written.tokens_per_second,
            f"first_token_speedup_{shape}": gained.first_token.ratio if gained else 1.0,
            f"token_speedup_{shape}": gained.token.ratio if gained else 1.0,
        }
    if evaluation.memory:
        row |= {
            "load_peak_bytes": evaluation.memory.load_peak_bytes,
            "inference_peak_bytes": evaluation.memory.inference_peak_bytes,
            "cuda_peak_bytes": evaluation.memory.cuda_peak_bytes,
        }
    return row


def _test(name: str, test: PairedTest | None) -> dict[str, Value]:
    return {
        f"{name}_change": test.change if test else None,
        f"{name}_change_low": test.low if test else None,
        f"{name}_change_high": test.high if test else None,
        f"{name}_p": test.p_value if test else None,
        f"{name}_p_holm": test.p_holm if test else None,
    }


def _prefixes(scores: tuple[TaskScore, ...]) -> list[str]:
    if len(scores) == 1:
        return [""]
    names = [score.task for score in scores]
    return [f"{name}{f'_{at + 1}' if names.count(name) > 1 else ''}/" for at, name in enumerate(names)]
