"""The fresh process of `measure_memory`: `python -m llmcompress.evaluation.memory_probe FOLDER BATCH TOKENS DEVICE`.

It imports everything, loads the folder, runs one batch, and writes one line of JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch
import transformers

import llmcompress  # noqa: F401 - lets transformers know the library's own quantization

from .inference import evaluating
from .latency import forward_inputs
from .memory import Memory


def probe(folder: Path, batch_size: int, tokens: int, device: str) -> Memory:
    """Load `folder`, run one batch of random tokens, and return the peaks of this process."""
    config = transformers.AutoConfig.from_pretrained(folder)
    # The class is looked up before the baseline is taken: looking it up imports its module.
    cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    cuda = device.startswith("cuda")
    baseline = _start_phase()
    model = cls.from_pretrained(folder).to(device)
    load_peak = _peak_bytes()
    _start_phase()
    with evaluating(model):
        model(**forward_inputs(model, batch_size, tokens))
    return Memory(
        baseline_bytes=baseline,
        load_peak_bytes=load_peak,
        inference_peak_bytes=_peak_bytes(),
        cuda_peak_bytes=torch.cuda.max_memory_allocated(device) if cuda else None,
        batch_size=batch_size,
        tokens=tokens,
    )


def _start_phase() -> int:
    """Forget the peak so far where the system can (Linux), and return the bytes resident now."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        try:
            reset.write_text("5")
        except OSError as error:
            # Some containers forbid it: then the peak of a phase includes the phases before it, which is still true.
            sys.stderr.write(f"the peak cannot be reset here: {error}\n")
    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    """Return the peak of resident bytes since the last reset.

    Not `ru_maxrss` where /proc can be read: a process starts with its parent's, which may be far larger.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


if __name__ == "__main__":
    found = probe(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    sys.stdout.write(found.model_dump_json() + "\n")
