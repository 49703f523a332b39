"""What a model is asked to do, each task one file, registered by name in `llmcompress.tasks`."""

from .custom import CustomTask
from .forward import Batch, ForwardTask, Run
from .language_modeling import LanguageModeling
from .lm_eval_task import LMEvalTask
from .masked_language_modeling import MaskedLanguageModeling
from .multiple_choice import MultipleChoice
from .question_answering import QuestionAnswering
from .task import ExampleResult, MetricKind, Task, TaskScore
from .text_classification import TextClassification
from .text_generation import TextGeneration
from .token_classification import TokenClassification

__all__ = [
    "Batch",
    "CustomTask",
    "ExampleResult",
    "ForwardTask",
    "LMEvalTask",
    "LanguageModeling",
    "MaskedLanguageModeling",
    "MetricKind",
    "MultipleChoice",
    "QuestionAnswering",
    "Run",
    "Task",
    "TaskScore",
    "TextClassification",
    "TextGeneration",
    "TokenClassification",
]
