"""`compress_checkpoint`: `compress` for models bigger than memory, from folder to folder, block after block."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..anatomy.footprint import Footprint, footprint
from ..anatomy.turns import set_keeper
from ..checkpoint import read_metadata
from ..compressor import Action, Compressor, Context
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..inputs import check_inputs, check_seed
from ..kept_blocks import KeptBlocks
from ..measured import account, is_finite, plan_step, refuse_broken, seeded, shapes
from ..pipeline import Pipeline, Step
from ..result import Report, StepRecord, library_versions
from ..tensor_files import write_json
from .assembly import assemble
from .folder import open_folder
from .opening import open_empty, open_model
from .residence import Residence
from .run import describe, enter, identity, is_done, known_run, locked, refuse_foreign_work

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Two runs end with the same bytes, so no time is written.
_UNWRITTEN: Any = {"steps": {"__all__": {"seconds"}}}


def compress_checkpoint(
    folder_in: str | Path,
    folder_out: str | Path,
    steps: Step | Sequence[Step],
    *,
    data: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Run `steps` over the model in `folder_in`, and write `folder_out`, with about two blocks in memory at a time.

    The result is, bit for bit, the one of `compress` on the model in memory. Weights are read from the safetensors
    files when a block needs them, and written as soon as the block is done; the embeddings and whatever else is in no
    block are in memory all the time, and so are the hidden states of the calibration texts, up to a quarter of the free
    memory (the rest lies in a temporary folder).

    Until it is complete, everything lies in `folder_out.partial`, beside `folder_out`. A run that was stopped at any
    point, or failed for want of room, continues there when it is called again with the same arguments, and ends with
    the same bytes. It needs as much free space as the float model has, where a step follows another one twice as much.

    Args:
        folder_in: a local folder with `config.json` and safetensors files, one or many.
        folder_out: a new folder; it appears when it is complete, and plain `from_pretrained` loads it.
        steps: one step or several whose `in_turns` holds: compressors, their names, or their dicts.
        data: calibration examples; anything that `load_examples` takes.
        tokenizer: for the texts of `data`; found in `folder_in` if there is one. Written to `folder_out`.
        seed: seeds every step.
        progress: show progress bars.

    Returns:
        The report, without scores and speeds. The folder has it as well, but for the seconds.

    Raises:
        CheckpointError: a folder is missing, damaged, in use by another process, or holds something else: the result or
            the beginnings of a run with other steps, data, seed, inputs or library versions.
        UnsupportedModelError: a step does not work block by block, or the model cannot be streamed.
        CompressionError: one of its branches, as of `compress`.

    Example:
        >>> import tempfile
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = tiny_model("llama").save_pretrained(f"{folder}/in")
        ...     report = compress_checkpoint(f"{folder}/in", f"{folder}/out", "dynamic_quantization", progress=False)
        ...     type(lc.load(f"{folder}/out").model.layers[0].mlp.up_proj).__name__
        'Int8Linear'
    """
    for field, given in (("folder_in", folder_in), ("folder_out", folder_out)):
        if not isinstance(given, (str, Path)):
            raise ConfigError(f"{field} must be a folder, got {given!r:.80}; lc.compress takes models in memory.")
    chain = Pipeline(steps=steps)
    flat = chain.flatten()
    _refuse_steps(flat)
    check_seed(seed, "compress_checkpoint.seed")
    out = Path(folder_out).resolve()
    work = out.with_name(f"{out.name}.partial")
    for field, other in (("folder_in", Path(folder_in).resolve()), ("the working folder", Path.cwd())):
        if out == other:
            raise ConfigError(f"folder_out must be another folder than {field}, got {str(folder_out)!r}.")
    refuse_foreign_work(work)
    folder = open_folder(folder_in)
    empty = open_empty(folder)
    examples, tokenizer = check_inputs(empty, flat, data, tokenizer, None, True)
    with locked(work):
        run = describe(folder, chain.to_dict(), seed, examples, tokenizer, known_run(work))
        if is_done(out, run):
            report = Report.model_validate(read_metadata(out))
        else:
            enter(work, run)
            # A tokenizer remembers how it was called last, and saves that too: the one that is written is not used.
            used = copy.deepcopy(tokenizer)
            context = Context(data=examples, tokenizer=used, seed=seed, progress=progress)
            model, stored = open_model(folder, empty, work / "converted")
            with Residence(model, stored) as residence:
                report = _run_all(flat, residence, context, work, chain)
                metadata = {
                    **json.loads(report.model_dump_json(exclude=_UNWRITTEN)),
                    "run": identity(run),
                }
                final = work / "final"
                assemble(
                    residence,
                    KeptBlocks(_folder_of(work, flat, len(flat) - 1), residence, context),
                    final,
                    source=folder.path,
                    tokenizer=tokenizer,
                    metadata=metadata,
                )
            os.replace(final, out)
    shutil.rmtree(work, ignore_errors=True)
    return report


def _refuse_steps(steps: Sequence[Compressor]) -> None:
    if not steps:
        raise ConfigError("compress_checkpoint() must have at least one step, got none.")
    for step in steps:
        if not step.in_turns:
            raise UnsupportedModelError(
                f"{step} does not work one block at a time, and compress_checkpoint cannot run it; load the model and "
                f"pass it to lc.compress."
            )


def _run_all(
    steps: Sequence[Compressor], residence: Residence, context: Context, work: Path, chain: Pipeline
) -> Report:
    """Run the steps that are left to run, and account for all."""
    model = residence.model
    records = [_record_of(work, index) for index in range(len(steps))]
    done = next((index for index in reversed(range(len(steps))) if records[index] is not None), -1)
    base = _base_of(work)
    if done < 0:
        plans = [plan_step(step, model, context) for step in steps]
        if base is None:
            base = footprint(model)
            write_json(base.model_dump(mode="json"), work / "base.json")
    else:
        KeptBlocks(_folder_of(work, steps, done), residence, context).restore_all()
    assert base is not None
    report = Report(
        model=type(model).__name__, recipe=chain.to_dict(), seed=context.seed, versions=library_versions(), base=base
    )
    report.steps.extend(record for record in records[: done + 1] if record is not None)
    finite = None if done >= 0 else is_finite(model)
    for index in range(done + 1, len(steps)):
        step = steps[index]
        actions = plans[0] if index == 0 else plan_step(step, model, context)
        stage = KeptBlocks(_folder_of(work, steps, index), residence, context)
        report.steps.append(_run_step(step, residence, stage, actions, context))
        if finite is not False:
            refuse_broken(step, model)
        write_json(report.steps[-1].model_dump(mode="json", exclude={"seconds"}), work / f"{index}.json")
        if index:
            KeptBlocks(_folder_of(work, steps, index - 1), residence, context).remove()
    return report


def _run_step(
    step: Compressor, residence: Residence, stage: KeptBlocks, actions: list[Action], context: Context
) -> StepRecord:
    model = residence.model
    context.told.clear()
    context.corrected.clear()
    before = shapes(model)
    start = time.perf_counter()
    set_keeper(model, stage)
    try:
        with seeded(context.seed):
            changed = step.compress(model, context)
    finally:
        set_keeper(model, None)
    if changed is not model:
        raise UnsupportedModelError(f"{type(step).__name__} returned another model, and cannot be streamed.")
    stage.close()
    seconds = time.perf_counter() - start
    model.eval()
    residence.rest()
    return account(step, model, before, actions, context, seconds)


def _folder_of(work: Path, steps: Sequence[Compressor], index: int) -> Path:
    return work / f"{index}-{steps[index].to_dict()['name']}"


def _record_of(work: Path, index: int) -> StepRecord | None:
    content = _read(work / f"{index}.json")
    return StepRecord.model_validate(content) if content is not None else None


def _base_of(work: Path) -> Footprint | None:
    content = _read(work / "base.json")
    return Footprint.model_validate(content) if content is not None else None


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); delete {file.parent} to begin anew.") from error
