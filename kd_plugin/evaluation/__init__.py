"""The user's own set: how good is a model on it, and is it better than another.

tasks.py has what is asked and what is right, evaluate.py asks a model, in_loop.py a student that trains; results.py
counts, keeps and compares, statistics.py says how sure a result is, page.py shows the answers. pilot/ finds the method
for a task, ladder.py the smallest student that will do; both train by recipes (recipes.py).
"""

from kd_plugin.evaluation.evaluate import evaluate
from kd_plugin.evaluation.in_loop import EvaluationSettings
from kd_plugin.evaluation.results import Evaluation, TaskResult, compare, load_evaluation
from kd_plugin.evaluation.statistics import Estimate, difference, pass_at, rate
from kd_plugin.evaluation.tasks import Task, TaskSettings, load_tasks

__all__ = [
    "Estimate",
    "Evaluation",
    "EvaluationSettings",
    "Task",
    "TaskResult",
    "TaskSettings",
    "compare",
    "difference",
    "evaluate",
    "load_evaluation",
    "load_tasks",
    "pass_at",
    "rate",
]
