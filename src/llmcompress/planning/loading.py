"""What the folder of a compressed model loads in: said of each runtime only where it is true of the format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from ..anatomy.module_sizes import quantized_by
from ..errors import UnsupportedModelError
from ..quantization.hf import METHOD, mark

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Runtime = Literal["transformers", "transformers with llmcompress", "vLLM", "ONNX"]


class Loading(BaseModel, frozen=True, extra="forbid"):
    """Whether one runtime takes the folder of the result."""

    runtime: Runtime = Field(description="what would load it")
    loads: bool | None = Field(description="whether it does; None: that depends, see `why`")
    why: str = Field(description="what decides")


def loadings(model: PreTrainedModel) -> list[Loading]:
    """Return what is known of each runtime for a model whose config tells what it is, as after a run.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> [one.loads for one in loadings(tiny_model("llama"))]
        [True, True, None, None]
    """
    try:
        mark(model)
    except UnsupportedModelError as error:
        untold = f"no folder can tell its sizes: {error}"
        return [Loading(runtime=runtime, loads=False, why=untold) for runtime in _RUNTIMES]
    method = quantized_by(model)
    if method == "bitsandbytes":
        return _answers(
            (True, "transformers' own bitsandbytes format; needs bitsandbytes"),
            (True, "as in plain transformers"),
            (None, "where vLLM knows the architecture and has bitsandbytes, on a GPU; not tried by this library"),
            (False, "its layers have no ONNX form; export the float model and quantize it there"),
        )
    if method == METHOD:
        return _answers(
            (False, "the weights are codes of this library; import llmcompress first"),
            (True, "plain from_pretrained after `import llmcompress`"),
            (False, "vLLM does not know the format of this library"),
            (False, "this library writes no ONNX; export the float model and quantize it there"),
        )
    if getattr(model.config, "quantization_config", None) is not None:
        return _answers(
            (False, "sizes that a plain config cannot tell are noted for llmcompress; import it first"),
            (True, "plain from_pretrained after `import llmcompress`"),
            (False, "vLLM builds the sizes of the plain config, and these are others"),
            (None, "exports as the architecture does, from the model in memory; not tried by this library"),
        )
    return _answers(
        (True, "the plain config tells all sizes"),
        (True, "as in plain transformers"),
        (None, "where vLLM knows the architecture: the folder is a plain one"),
        (None, "exports as the architecture does; not tried by this library"),
    )


_RUNTIMES: tuple[Runtime, ...] = ("transformers", "transformers with llmcompress", "vLLM", "ONNX")


def _answers(*answers: tuple[bool | None, str]) -> list[Loading]:
    return [
        Loading(runtime=runtime, loads=loads, why=why) for runtime, (loads, why) in zip(_RUNTIMES, answers, strict=True)
    ]
