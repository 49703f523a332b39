"""What a model is asked to do, each task one file, registered by name in `llmcompress.tasks`."""

from .forward import Batch, ForwardTask, Run
from .language_modeling import LanguageModeling
from .question_answering import QuestionAnswering
from .task import ExampleResult, MetricKind, Task, TaskScore
from .text_classification import TextClassification

__all__ = [
    "Batch",
    "ExampleResult",
    "ForwardTask",
    "LanguageModeling",
    "MetricKind",
    "QuestionAnswering",
    "Run",
    "Task",
    "TaskScore",
    "TextClassification",
]
