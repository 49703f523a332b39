"""What a model is asked to do, each task one file, registered by name in `llmcompress.tasks`."""

from .language_modeling import LanguageModeling
from .task import ExampleResult, Task, TaskScore
from .text_classification import TextClassification

__all__ = ["ExampleResult", "LanguageModeling", "Task", "TaskScore", "TextClassification"]
