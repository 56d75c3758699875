"""A tiny real model that recalls records from long contexts, and the task it was trained on."""

from retro_ops.models.load import is_recall
from retro_ops.models.recall.task import RecallTask, make_task

__all__ = ["RecallTask", "is_recall", "make_task"]
