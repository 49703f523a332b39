"""What a model costs: tables of speed, of generation, of size, and of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evaluation.flops import Flops
from ..evaluation.turns import Ratio
from ..evaluation.units import bytes_text, count_text, milliseconds_text, ratio_text
from .sheets import Cell, Sheet, faster_than_chance, ratio_words

if TYPE_CHECKING:
    from ..comparison import Comparison


def cost_sheets(comparison: Comparison) -> list[Sheet]:
    """Return a table for each cost that was measured."""
    found = (latencies(comparison), generation(comparison), sizes(comparison), memory(comparison))
    return [sheet for sheet in found if sheet is not None]


def latencies(comparison: Comparison) -> Sheet | None:
    """Return one row a model and shape: times, throughput, energy where it was measured; None without any."""
    with_energy = any(one.energy for entry in comparison.entries for one in entry.evaluation.latency)
    rows = []
    for entry in comparison.entries:
        for number, found in enumerate(entry.evaluation.latency):
            row = [
                Cell(entry.name),
                Cell(f"{found.batch_size}x{found.tokens}", sort=found.batch_size * found.tokens),
                _milliseconds(found.median_ms),
                _milliseconds(found.p90_ms),
                _milliseconds(found.p99_ms),
                Cell(count_text(found.tokens_per_second), sort=found.tokens_per_second),
                _speedup(entry.change.faster[number] if entry.change else None),
            ]
            if with_energy:
                joules = found.energy.joules if found.energy else None
                row.append(Cell("-") if joules is None else Cell(f"{joules:.3g} J", sort=joules))
            rows.append(tuple(row))
    header = ["model", "rows x tokens", "median", "p90", "p99", "tokens/s", "speed-up"]
    about = "One forward pass, all tokens at once. Speed-up: time of the base over the model's, with its 95 % interval."
    if with_energy:
        header.append("energy")
        counters = dict.fromkeys(
            name
            for entry in comparison.entries
            for one in entry.evaluation.latency
            for name in (one.energy.counters if one.energy else ())
        )
        about += f" Energy: joules a pass by the counters of the whole chip ({', '.join(counters)})."
    return Sheet("Speed", tuple(header), tuple(rows), about) if rows else None


def generation(comparison: Comparison) -> Sheet | None:
    """Return one row a model and (prompt, new) pair; None where no generation was timed."""
    rows = []
    for entry in comparison.entries:
        for number, found in enumerate(entry.evaluation.generation):
            gained = entry.change.generation[number] if entry.change else None
            rows.append(
                (
                    Cell(entry.name),
                    Cell(f"{found.batch_size}x({found.prompt_tokens} + {found.new_tokens})", sort=found.prompt_tokens),
                    _milliseconds(found.first_token_ms, found.first_token_p90_ms),
                    _speedup(gained.first_token if gained else None),
                    _milliseconds(found.token_ms, found.token_p90_ms),
                    _speedup(gained.token if gained else None),
                    Cell(count_text(found.tokens_per_second), sort=found.tokens_per_second),
                )
            )
    header = ("model", "rows x (prompt + new)", "first token", "speed-up", "each further", "speed-up", "new tokens/s")
    about = (
        "Greedy generation with the cache: the prompt in one pass, then token by token. Medians; speed-ups with their "
        "95 % intervals."
    )
    return Sheet("Generation", header, tuple(rows), about) if rows else None


def sizes(comparison: Comparison) -> Sheet:
    """Return the five sizes of each model, and the operations of a forward pass where they were counted."""
    with_sparse = any(entry.evaluation.size.sparse_bytes is not None for entry in comparison.entries)
    flops = comparison.base.evaluation.flops
    header = ["model", "weights", "non-zero", "in memory", "on disk"]
    header += ["sparse, theoretical"] if with_sparse else []
    header += [f"FLOPs, {flops.batch_size}x{flops.tokens}"] if flops else []
    rows = []
    for entry in comparison.entries:
        size, change = entry.evaluation.size, entry.change
        row = [
            Cell(entry.name),
            Cell(count_text(size.parameters), sort=size.parameters),
            Cell(
                count_text(size.nonzero),
                ratio_words(change.fewer_weights if change else None, "fewer"),
                sort=size.nonzero,
            ),
            Cell(
                bytes_text(size.memory_bytes),
                ratio_words(change.smaller_in_memory if change else None, "smaller"),
                sort=size.memory_bytes,
            ),
            Cell(
                bytes_text(size.disk_bytes),
                ratio_words(change.smaller_on_disk if change else None, "smaller"),
                sort=size.disk_bytes,
            ),
        ]
        if with_sparse:
            sparse = size.sparse_bytes
            row.append(Cell("-") if sparse is None else Cell(bytes_text(sparse), "not realised", sort=sparse))
        if flops:
            row.append(_operations(entry.evaluation.flops))
        rows.append(tuple(row))
    about = "Weights are counted whatever their encoding, tied ones once."
    if not all(entry.evaluation.size.from_files for entry in comparison.entries):
        about += " Bytes on disk are read off the folder, or computed from the tensors where the model came from none."
    if with_sparse:
        about += " Sparse: what a file would take that leaves zeros out; none is written and no kernel reads it."
    if flops:
        about += " FLOPs: of one forward pass; a quantized layer counts as the product it stands for."
    return Sheet("Size", tuple(header), tuple(rows), about)


def memory(comparison: Comparison) -> Sheet | None:
    """Return the peaks of a fresh process; None where they were not measured."""
    found = [(entry.name, entry.evaluation.memory) for entry in comparison.entries if entry.evaluation.memory]
    if not found:
        return None
    with_cuda = any(one.cuda_peak_bytes is not None for _, one in found)
    rows = [
        (
            Cell(name),
            _bytes(one.load_peak_bytes),
            _bytes(one.inference_peak_bytes),
            _bytes(one.baseline_bytes),
            _bytes(one.model_bytes),
            *((_bytes(one.cuda_peak_bytes),) if with_cuda else ()),
        )
        for name, one in found
    ]
    header = ["model", "peak, loading", "peak, running", "libraries alone", "the model's part"]
    header += ["CUDA peak"] if with_cuda else []
    first = found[0][1]
    about = (
        f"Resident memory of a fresh process that loads the model and runs {first.batch_size}x{first.tokens} tokens. "
        "Weights are mapped from the file and count when they are first read."
    )
    return Sheet("Peak memory", tuple(header), tuple(rows), about)


def _operations(flops: Flops | None) -> Cell:
    if flops is None or flops.count is None:
        return Cell("-", note=flops.reason if flops else "")
    return Cell(count_text(flops.count), sort=flops.count)


def _milliseconds(median: float, p90: float | None = None) -> Cell:
    return Cell(milliseconds_text(median), note=f"p90 {milliseconds_text(p90)}" if p90 is not None else "", sort=median)


def _bytes(count: int | None) -> Cell:
    return Cell("-") if count is None else Cell(bytes_text(count), sort=count)


def _speedup(ratio: Ratio | None) -> Cell:
    """Return a speed-up with its interval; the base's own is 1 and left blank."""
    if ratio is None:
        return Cell("", sort=1.0)
    interval = f"[{ratio.low:.2f}, {ratio.high:.2f}]"
    return Cell("", ratio_text(ratio.ratio), interval, ratio.ratio, faster_than_chance(ratio))
