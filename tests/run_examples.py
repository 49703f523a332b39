"""Runs scripts, notebooks and the Python blocks of Markdown pages in one fresh process: `run_examples.py OUT FILE...`.

Starting a process that imports torch takes seconds, so one serves all files. Each runs in a folder of its own, in which
a reader's files stand: a classifier, a language model, labelled tables and a text.
"""

import contextlib
import csv
import gc
import io
import json
import os
import re
import runpy
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

import torch
from transformers import BertForMaskedLM

from llmcompress import measured
from llmcompress.evaluation import cost, latency
from llmcompress.fitting import blocks
from llmcompress.testing import tiny_model, tiny_tokenizer

ROWS = [("a fine film", 1), ("what a bore", 0), ("warm and wise", 1), ("no idea at all", 0)] * 4
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def lay_out(folder: Path) -> None:
    """Write the files that the pages speak of."""
    for name, family in (("my-classifier", "bert"), ("my-language-model", "llama")):
        tiny_model(family).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "<extra_0>"
    tokenizer.save_pretrained(folder / "my-masked-model")
    BertForMaskedLM(tiny_model("bert").config).save_pretrained(folder / "my-masked-model")
    for name, rows in (("train.csv", ROWS), ("test.csv", ROWS[:4])):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    (folder / "text.txt").write_text("\n\n".join(text for text, _ in ROWS))


# What a notebook's cell of parameters says in earnest takes minutes.
SMALL = {
    "compose_a_bert.ipynb": {"texts": 4, "test_texts": 2, "unlabelled": 2, "epochs": 1, "encoder": "my-classifier"},
    "four_bit_methods_on_a_llama.ipynb": {"steps": 2, "texts": 4, "width": 64, "layers": 1},
    "fit_to_a_size.ipynb": {
        **{"texts": 4, "test_texts": 6, "unlabelled": 2, "epochs": 1, "encoder": "my-classifier"},
        **{"size": "200 KB", "impossible": "5 KB", "budget": "15 s"},
    },
}


def run(path: Path) -> None:
    """Run a script, or all cells of a notebook or Python blocks of a page in one namespace."""
    if path.suffix == ".py":
        runpy.run_path(str(path), run_name="__main__")
        return
    if path.suffix == ".ipynb":
        names = {"__name__": path.stem}
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{path} {cell['id']}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert SMALL[path.name].keys() <= names.keys()
                names.update(SMALL[path.name])
        return
    text = path.read_text(encoding="utf-8")
    names = {"__name__": path.stem}
    for block in BLOCK.finditer(text):
        # Empty lines before the code: a traceback then names the line of the page.
        before = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(before + block[1], str(path), "exec"), names)


def main(answer: str, *files: str) -> None:
    """Write, for each file, what it printed, the files it left, and its traceback or None."""
    torch.set_num_threads(1)
    # What the readers' tiny models take means nothing.
    latency.QUICK_MS = 0.0
    measured.SPEED_TOKENS = 8
    blocks._SECONDS = 0.01
    cost.measure_latencies = partial(cost.measure_latencies, seconds=0.01)
    cost.measure_generation = partial(cost.measure_generation, seconds=0.01)
    outcomes = {}
    for file in files:
        # Each training collects garbage over all that was imported, half a second each time.
        gc.collect()
        gc.freeze()
        path = Path(file).resolve()
        printed, error = io.StringIO(), None
        with tempfile.TemporaryDirectory() as folder:
            lay_out(Path(folder))
            before = set(os.listdir(folder))
            home = os.getcwd()
            os.chdir(folder)
            try:
                with contextlib.redirect_stdout(printed):
                    run(path)
            except Exception:
                error = traceback.format_exc()
            finally:
                os.chdir(home)
            left = sorted({*os.listdir(folder)} - before)
        outcomes[path.name] = {"printed": printed.getvalue(), "error": error, "left": left}
    Path(answer).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
