"""llmcompress: compress any Hugging Face model by strategies that compose, and prove what each step cost and gained.

Importing the package imports no torch: every public name is loaded when it is first used. `__init__.pyi` tells type
checkers and editors the same names.
"""

from importlib import import_module
from typing import Any

from . import _autoregister

__version__ = "0.1.0"

_HOME = {
    "checkpoint": ("load",),
    "comparison": ("Comparison", "compare"),
    "compressor": ("Action", "Compressor", "Context", "Cut", "Outline"),
    "contents": ("Contents", "show"),
    "data": ("Example", "load_examples"),
    "distillation.cache": ("TeacherCache",),
    "distillation.distillation": ("KnowledgeDistillation",),
    "distillation.early_stopping": ("EarlyStopping",),
    "distillation.generation": ("Generation",),
    "distillation.lora": ("LoRA",),
    "distillation.loss_choice": ("SoftLoss",),
    "distillation.masked_words": ("MaskedWords",),
    "distillation.random_spans": ("RandomSpans",),
    "errors": (
        "BusyError",
        "CheckpointError",
        "ClaimError",
        "CompressionError",
        "ConfigError",
        "DuplicateNameError",
        "GateError",
        "MissingInputError",
        "NothingToCompressError",
        "PipelineOrderError",
        "PluginError",
        "UnknownNameError",
        "UnsupportedModelError",
        "VerificationError",
    ),
    "evaluation.evaluate": ("Evaluation", "evaluate"),
    "evaluation.tasks": (
        "CustomTask",
        "LMEvalTask",
        "LanguageModeling",
        "MaskedLanguageModeling",
        "MultipleChoice",
        "QuestionAnswering",
        "Task",
        "TextClassification",
        "TextGeneration",
        "TokenClassification",
    ),
    "fitting.fit": ("fit",),
    "fitting.result": ("FitResult",),
    "gates": ("MaxDrop", "MaxPerplexityRatio", "MinAgreement"),
    "pipeline": ("Pipeline", "compress"),
    "planning.document": ("Plan",),
    "planning.plan": ("plan",),
    "pruning.depth": ("DepthPruning",),
    "pruning.importance": ("register_importance",),
    "pruning.magnitude": ("MagnitudePruning",),
    "pruning.sparsegpt": ("SparseGPTPruning",),
    "pruning.structured": ("StructuredPruning",),
    "pruning.torch_pruning": ("TorchPruning",),
    "pruning.vocabulary": ("VocabularyPruning",),
    "pruning.wanda": ("WandaPruning",),
    "quantization.awq": ("AWQ",),
    "quantization.bitsandbytes": ("BitsAndBytesQuantization",),
    "quantization.dequantize": ("dequantize",),
    "quantization.dynamic": ("DynamicQuantization",),
    "quantization.gptq": ("GPTQ",),
    "quantization.growing_cache": ("GrowingCache",),
    "quantization.kernels.dispatch": ("kernels",),
    "quantization.sensitivity": ("sensitivity",),
    "quantization.sensitivity_table": ("Sensitivity",),
    "quantization.static": ("StaticQuantization",),
    "quantization.kv_cache": ("QuantizedCache",),
    "quantization.weight_only": ("WeightOnlyQuantization",),
    "registry": ("Registry", "compressors", "importances", "register", "tasks"),
    "result": ("Report", "Result"),
    "resume": ("remove_stages",),
    "streaming.compress_checkpoint": ("compress_checkpoint",),
    "sweeping.sweep": ("Sweep", "orders", "sweep"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)

_autoregister.install()


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
