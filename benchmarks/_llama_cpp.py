"""llama.cpp as an engine of the benchmarks: a Llama of random weights in Q4_0, which llama-cpp-python runs.

Needs `pip install llama-cpp-python gguf`, on a machine with AMX by the command in `WITHOUT_AMX`. All matrices have 4
bits, the embedding and the head too (`--pure` of llama.cpp's own quantizer), so that as many bytes are read a token as
of other engines' 4 bits in groups of 32.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Of the quantizer's input: what the codes are makes no difference to the time.
_SEED = 0
_NO_AMX = r"-mno-amx-tile\ -mno-amx-int8\ -mno-amx-bf16"
WITHOUT_AMX = (
    f'CMAKE_ARGS="-DCMAKE_C_FLAGS={_NO_AMX} -DCMAKE_CXX_FLAGS={_NO_AMX}" '
    "pip install --no-binary llama-cpp-python llama-cpp-python"
)
_FLOATS = ctypes.POINTER(ctypes.c_float)


def engine(sizes: dict[str, int], threads: int) -> Callable[[list[int], int], list[int]]:
    """Return what writes greedily: given a prompt's tokens, and how many to write.

    Args:
        sizes: of the model, as `decode_llama.SIZES` has them.
        threads: of a product.

    Raises:
        ImportError: llama-cpp-python or gguf is not installed, or it was built with AMX.
    """
    from llama_cpp import Llama, llama_cpp

    if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
        # Its tiles (llama-cpp-python 0.3.36) are multiplied before they are configured: an illegal instruction.
        raise ImportError(f"a build of llama-cpp-python without AMX: {WITHOUT_AMX}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama-q4_0.gguf"
        write_gguf(sizes, path)
        # The file may go: it is read, not mapped.
        llama = Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, use_mmap=False, verbose=False)
    vocabulary = sizes["vocab_size"]

    def write(prompt: list[int], tokens: int) -> list[int]:
        llama.reset()
        llama.eval(prompt)
        written: list[int] = []
        for _ in range(tokens):
            logits = llama._ctx.get_logits()
            written.append(int(np.ctypeslib.as_array(ctypes.cast(logits, _FLOATS), (vocabulary,)).argmax()))
            if len(written) < tokens:
                llama.eval(written[-1:])
        return written

    return write


def write_gguf(sizes: dict[str, int], path: Path) -> None:
    """Write a Llama of random weights, all matrices in Q4_0.

    Raises:
        ImportError: gguf is not installed.
    """
    import gguf

    hidden, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    keys = hidden // sizes["heads"] * sizes["groups"]
    draw = np.random.default_rng(_SEED)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["groups"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(hidden // sizes["heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    _add_tokenizer(writer, gguf, vocabulary)

    def matrix(name: str, outputs: int, inputs: int) -> None:
        # One block of rows is drawn, and repeated: to draw and to code a billion would take minutes.
        some = (0.02 * draw.standard_normal((min(outputs, 256), inputs))).astype(np.float32)
        codes = gguf.quants.quantize(some, gguf.GGMLQuantizationType.Q4_0)
        repeated = np.concatenate([codes] * -(-outputs // len(codes)))[:outputs]
        writer.add_tensor(name, repeated, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, dtype=np.float32))

    matrix("token_embd.weight", vocabulary, hidden)
    for number in range(sizes["layers"]):
        block: dict[str, tuple[int, int]] = {
            "attn_q": (hidden, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        for name, (outputs, inputs) in block.items():
            matrix(f"blk.{number}.{name}.weight", outputs, inputs)
        ones(f"blk.{number}.attn_norm.weight")
        ones(f"blk.{number}.ffn_norm.weight")
    ones("output_norm.weight")
    matrix("output.weight", vocabulary, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, gguf: Any, vocabulary: int) -> None:
    """Add a tokenizer that is never used, without which llama.cpp loads no model."""
    kinds = [gguf.TokenType.NORMAL] * vocabulary
    kinds[:3] = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>".encode() for number in range(vocabulary)])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
