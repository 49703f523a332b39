"""Memory and time of `lc.compress_checkpoint` on a random Llama in bfloat16, written shard by shard and never loaded.

The work runs in a process of its own, which looks every 20 ms at what the kernel says of it (`/proc/self/status`):
`RssAnon`, memory that only the swap could take; `RssFile`, pages of mapped files, which the kernel takes back when
memory is short; `VmHWM`, the peak of both together. The run fails if `VmHWM` is above the limit. A second run of the
same is ended with SIGKILL in the middle, continued, and its files are compared with those of the first.

    python benchmarks/streamed_memory.py                                # 1.1 B parameters, about 2.2 GB
    python benchmarks/streamed_memory.py --layers 4 --hidden 512 --ffn 1408 --limit 1
    python benchmarks/streamed_memory.py --steps sparsegpt_pruning dynamic_quantization
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

_LOOK_SECONDS = 0.02
_VOCABULARY = 32000


def build(folder: Path, layers: int, hidden: int, ffn: int) -> int:
    """Write config, tokenizer and one shard a block; return the bytes of the weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from llmcompress.testing import tiny_tokenizer

    heads = max(hidden // 64, 1)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        vocab_size=_VOCABULARY,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    narrow = config.num_key_value_heads * (hidden // heads)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(layers + 1):
        if number < layers:
            prefix = f"model.layers.{number}"
            shard = {f"{prefix}.{name}.weight": drawn(*shape) for name, shape in shapes.items()}
            shard |= {f"{prefix}.{name}.weight": ones for name in ("input_layernorm", "post_attention_layernorm")}
            shard = {name: tensor.clone() for name, tensor in shard.items()}
        else:
            shard = {
                "model.embed_tokens.weight": drawn(_VOCABULARY, hidden),
                "model.norm.weight": ones,
                "lm_head.weight": drawn(_VOCABULARY, hidden),
            }
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def work(source: str, out: str, steps: list[str], texts: int, tokens: int) -> None:
    """Compress, and print the peaks as JSON."""
    import llmcompress as lc

    data = ["".join(chr(97 + (row * 7 + at * at) % 26) for at in range(tokens)) for row in range(texts)]
    made = [
        {"name": name, "samples": texts, "max_length": tokens} if name.endswith("pruning") else {"name": name}
        for name in steps
    ]
    run = lc.compress_checkpoint  # brings torch and transformers
    peaks = {"RssAnon": 0, "RssFile": 0}
    before = _status()
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_SECONDS):
            for key, value in _status().items():
                if key in peaks:
                    peaks[key] = max(peaks[key], value)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    start = time.perf_counter()
    report = run(source, out, made, data=data, progress=False)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    of_steps = {record.step["name"]: record.seconds for record in report.steps}
    print(json.dumps({**peaks, "VmHWM": _status()["VmHWM"], "before": before, "seconds": seconds, "steps": of_steps}))


def _status() -> dict[str, int]:
    """Return what the kernel says of this process, bytes by name."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        found[path.name] = digest.hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--steps", nargs="+", default=["wanda_pruning", "dynamic_quantization"])
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="tokens a text")
    parser.add_argument("--limit", type=float, default=3.0, help="GB that VmHWM may reach")
    parser.add_argument("--no-kill", action="store_true", help="leave the killed and continued run out")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder, removed at the end")
    parser.add_argument("--work", nargs=2, metavar=("IN", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(*asked.work, asked.steps, asked.texts, asked.tokens)
        return
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="streamed-") as temporary:
        folder = Path(temporary)
        (folder / "in").mkdir()
        size = build(folder / "in", asked.layers, asked.hidden, asked.ffn)
        print(f"model: {size / 1e9:.2f} GB in bfloat16, {asked.layers} blocks; steps: {', '.join(asked.steps)}")
        print(f"{asked.texts} texts of {asked.tokens} tokens; threads {os.environ.get('OMP_NUM_THREADS', 'default')}")
        command = [sys.executable, __file__, *sys.argv[1:], "--work", str(folder / "in")]
        found = json.loads(
            subprocess.run([*command, str(folder / "out")], stdout=subprocess.PIPE, check=True, text=True).stdout
        )
        for key in ("VmHWM", "RssAnon", "RssFile"):
            print(f"peak {key:8} {found[key] / 1e9:6.2f} GB (before the work {found['before'][key] / 1e9:.2f})")
        told = ", ".join(f"{name} {seconds / asked.layers:.1f}" for name, seconds in found["steps"].items())
        print(f"{found['seconds']:.0f} s in all; seconds a block: {told}")
        written = sum(path.stat().st_size for path in (folder / "out").iterdir())
        print(f"written: {written / 1e9:.2f} GB")
        if not asked.no_kill:
            _kill_in_the_middle([*command, str(folder / "again")], folder / "again.partial", asked.layers)
            subprocess.run([*command, str(folder / "again")], stdout=subprocess.DEVNULL, check=True)
            same = hashes(folder / "out") == hashes(folder / "again")
            print(f"killed in the middle and continued: {'the same bytes' if same else 'OTHER BYTES'}")
            if not same:
                raise SystemExit(1)
            shutil.rmtree(folder / "again")
        if found["VmHWM"] > asked.limit * 1e9:
            raise SystemExit(f"VmHWM is above {asked.limit} GB")


def _kill_in_the_middle(command: list[str], partial: Path, layers: int) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(partial.glob("0-*/block-*.json"))) < max(layers // 2, 1):
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be killed")
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    print(f"killed with {len(list(partial.glob('0-*/block-*.json')))} of {layers} blocks finished")


if __name__ == "__main__":
    main()
