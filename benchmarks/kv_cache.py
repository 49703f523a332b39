"""What a key-value cache in few bits costs a trained Llama, and what it takes and gives: loss, bytes a token, speed.

Loss: the first 60 windows of 256 tokens of tinystories, all fed token by token behind the first, so that every token
sees the cache as a generated one would; nats a token. Bytes: held at the end of a window, a token and row. Speed: a
step of one token behind so many, on a random Llama with heads of 64 channels; caches in turn, medians of the rounds.

    python benchmarks/kv_cache.py --threads 1 --assets FOLDER
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import llmcompress as lc
from _machine import describe_machine
from _tinystories import texts_of, token_ids

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("babyllama-tok105-hf", "stories260K-hf")
WINDOW, WINDOWS = 256, 60
CACHES = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "keys 4, values 2 bits": {"bits": (4, 2)},
    "2 bits": {"bits": 2},
    "4 bits, keys by token": {"bits": 4, "keys": "token"},
    "2 bits, keys by token": {"bits": 2, "keys": "token"},
}
RESIDUALS = (128, 32, 0)


@torch.inference_mode()
def loss(model: torch.nn.Module, windows: torch.Tensor, cache: DynamicCache) -> float:
    """Return the mean negative log-likelihood of `windows` (windows, tokens) fed token by token, in nats a token."""
    total = 0.0
    for at in range(windows.shape[1] - 1):
        logits = model(windows[:, at : at + 1], past_key_values=cache).logits[:, 0].float()
        total += float(torch.nn.functional.cross_entropy(logits, windows[:, at + 1], reduction="sum"))
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def held(cache: DynamicCache) -> int:
    """Return the bytes of keys and values."""
    if isinstance(cache, lc.QuantizedCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def quality(folder: Path, text: str) -> None:
    """Print a table of losses and of bytes a token."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = token_ids(AutoTokenizer.from_pretrained(folder), text)
    count = min(WINDOWS, (len(ids) - 1) // WINDOW)
    windows = ids[: count * WINDOW].reshape(count, WINDOW)
    plain = DynamicCache(config=model.config)
    dense = loss(model, windows, plain)
    tokens = windows.numel() - count
    print(f"\n### {folder.name}: loss (bytes a token), windows of {WINDOW} tokens\n")
    print("| cache |" + "".join(f" {residual} newest in float |" for residual in RESIDUALS))
    print("|---|" + "---|" * len(RESIDUALS))
    print(f"| float32 | {dense:.4f} ({held(plain) / tokens:.0f}) |" + " |" * (len(RESIDUALS) - 1), flush=True)
    for name, fields in CACHES.items():
        cells = []
        for residual in RESIDUALS:
            cache = lc.QuantizedCache(model.config, group_size=32, residual_length=residual, **fields)
            cells.append(f"{loss(model, windows, cache):.4f} ({held(cache) / tokens:.0f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


@torch.inference_mode()
def speed(lengths: tuple[int, ...], rounds: int, steps: int) -> None:
    """Print milliseconds a step of one token behind so many, each cache in turn, and what the caches hold."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=16384,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    makers = {
        "float32": lambda: DynamicCache(config=config),
        **{f"{bits} bits": lambda bits=bits: lc.QuantizedCache(config, bits=bits) for bits in (8, 4, 2)},
    }
    print(f"\n### Milliseconds a step, medians of {rounds} rounds of {steps} steps, caches in turn (MiB held)\n")
    print("Random Llama of 134 million parameters, 12 layers of 12 heads of 64, batch 1; groups of 64, 128 in float.\n")
    print("| tokens before |" + "".join(f" {name} |" for name in makers))
    print("|---|" + "---|" * len(makers))
    draw = random.Random(0)
    for length in lengths:
        prompt = torch.randint(0, 32000, (1, length))
        caches = {name: make() for name, make in makers.items()}
        for cache in caches.values():
            for part in prompt.split(512, dim=1):
                model(part, past_key_values=cache, logits_to_keep=1)
        times: dict[str, list[float]] = {name: [] for name in makers}
        for turn in range(rounds + 1):
            for name in draw.sample(list(caches), len(caches)):
                start = time.perf_counter()
                for _ in range(steps):
                    model(prompt[:, :1], past_key_values=caches[name])
                if turn:  # the first round warms up
                    times[name].append((time.perf_counter() - start) / steps * 1e3)
        base = statistics.median(times["float32"])
        cells = []
        for name, cache in caches.items():
            median = statistics.median(times[name])
            cells.append(f" {median:.1f} {base / median:.2f}x ({held(cache) / 2**20:.1f}) |")
        print(f"| {length} |{''.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", choices=["quality", "speed"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(describe_machine())
    if arguments.only != "speed":
        text, _ = texts_of(arguments.assets)
        for name in MODELS:
            quality(arguments.assets / name, text)
    if arguments.only != "quality":
        speed(tuple(arguments.lengths), arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
