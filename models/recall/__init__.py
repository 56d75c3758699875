"""A tiny real model that recalls records from long contexts, and the task it was trained on."""

from retro_ops.models.recall.task import RecallTask, make_task

__all__ = ["RecallTask", "make_task"]
