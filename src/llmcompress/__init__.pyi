"""The public names, for type checkers and editors; `__init__.py` loads them lazily."""

from .checkpoint import load as load
from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .compressor import Action as Action
from .compressor import Compressor as Compressor
from .compressor import Context as Context
from .compressor import Cut as Cut
from .compressor import Outline as Outline
from .contents import Contents as Contents
from .contents import show as show
from .data import Example as Example
from .data import load_examples as load_examples
from .distillation.cache import TeacherCache as TeacherCache
from .distillation.distillation import KnowledgeDistillation as KnowledgeDistillation
from .distillation.early_stopping import EarlyStopping as EarlyStopping
from .distillation.generation import Generation as Generation
from .distillation.lora import LoRA as LoRA
from .distillation.loss_choice import SoftLoss as SoftLoss
from .distillation.masked_words import MaskedWords as MaskedWords
from .distillation.random_spans import RandomSpans as RandomSpans
from .errors import (
    BusyError as BusyError,
)
from .errors import (
    CheckpointError as CheckpointError,
)
from .errors import (
    ClaimError as ClaimError,
)
from .errors import (
    CompressionError as CompressionError,
)
from .errors import (
    ConfigError as ConfigError,
)
from .errors import (
    DuplicateNameError as DuplicateNameError,
)
from .errors import (
    GateError as GateError,
)
from .errors import (
    MissingInputError as MissingInputError,
)
from .errors import (
    NothingToCompressError as NothingToCompressError,
)
from .errors import (
    PipelineOrderError as PipelineOrderError,
)
from .errors import (
    PluginError as PluginError,
)
from .errors import (
    UnknownNameError as UnknownNameError,
)
from .errors import (
    UnsupportedModelError as UnsupportedModelError,
)
from .errors import (
    VerificationError as VerificationError,
)
from .evaluation.evaluate import Evaluation as Evaluation
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.tasks import (
    CustomTask as CustomTask,
)
from .evaluation.tasks import (
    LanguageModeling as LanguageModeling,
)
from .evaluation.tasks import (
    LMEvalTask as LMEvalTask,
)
from .evaluation.tasks import (
    MaskedLanguageModeling as MaskedLanguageModeling,
)
from .evaluation.tasks import (
    MultipleChoice as MultipleChoice,
)
from .evaluation.tasks import (
    QuestionAnswering as QuestionAnswering,
)
from .evaluation.tasks import (
    Task as Task,
)
from .evaluation.tasks import (
    TextClassification as TextClassification,
)
from .evaluation.tasks import (
    TextGeneration as TextGeneration,
)
from .evaluation.tasks import (
    TokenClassification as TokenClassification,
)
from .fitting.fit import fit as fit
from .fitting.result import FitResult as FitResult
from .gates import MaxDrop as MaxDrop
from .gates import MaxPerplexityRatio as MaxPerplexityRatio
from .gates import MinAgreement as MinAgreement
from .pipeline import Pipeline as Pipeline
from .pipeline import compress as compress
from .planning.document import Plan as Plan
from .planning.plan import plan as plan
from .pruning.depth import DepthPruning as DepthPruning
from .pruning.importance import register_importance as register_importance
from .pruning.magnitude import MagnitudePruning as MagnitudePruning
from .pruning.sparsegpt import SparseGPTPruning as SparseGPTPruning
from .pruning.structured import StructuredPruning as StructuredPruning
from .pruning.torch_pruning import TorchPruning as TorchPruning
from .pruning.vocabulary import VocabularyPruning as VocabularyPruning
from .pruning.wanda import WandaPruning as WandaPruning
from .quantization.awq import AWQ as AWQ
from .quantization.bitsandbytes import BitsAndBytesQuantization as BitsAndBytesQuantization
from .quantization.dequantize import dequantize as dequantize
from .quantization.dynamic import DynamicQuantization as DynamicQuantization
from .quantization.gptq import GPTQ as GPTQ
from .quantization.growing_cache import GrowingCache as GrowingCache
from .quantization.kernels.dispatch import kernels as kernels
from .quantization.kv_cache import QuantizedCache as QuantizedCache
from .quantization.sensitivity import sensitivity as sensitivity
from .quantization.sensitivity_table import Sensitivity as Sensitivity
from .quantization.static import StaticQuantization as StaticQuantization
from .quantization.weight_only import WeightOnlyQuantization as WeightOnlyQuantization
from .registry import Registry as Registry
from .registry import compressors as compressors
from .registry import importances as importances
from .registry import register as register
from .registry import tasks as tasks
from .result import Report as Report
from .result import Result as Result
from .resume import remove_stages as remove_stages
from .streaming.compress_checkpoint import compress_checkpoint as compress_checkpoint
from .sweeping.sweep import Sweep as Sweep
from .sweeping.sweep import orders as orders
from .sweeping.sweep import sweep as sweep

__version__: str
