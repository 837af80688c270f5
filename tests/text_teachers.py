"""Text teachers that follow a script: no server, no model."""

from kd_plugin.errors import ServerError
from kd_plugin.lineage import Source
from kd_plugin.text.teaching import Correction, Evaluation
from kd_plugin.text.writers import Usage


class ScriptedTeacher:
    """Evaluates by whether a response contains the row's answer, and corrects to what ``says`` makes of the row."""

    def __init__(self, name="scripted", says=lambda row: str(row["answer"]), score=None, dead=False):
        self.source = Source(name=name, license="apache-2.0", ref=None, signal="text")
        self.name, self.says, self.score, self.dead = name, says, score, dead
        self.identity = {"kind": "scripted", "name": name}
        self.seen = []

    def evaluate(self, cases):
        self._answer("evaluate", cases)
        if self.score is not None:
            return [Evaluation(self.score(case), usage=Usage(10, 2)) for case in cases]
        return [Evaluation(float(case.row["answer"] in case.response), usage=Usage(10, 2)) for case in cases]

    def correct(self, cases, first_wrong):
        self._answer("correct", cases)
        return [Correction(self.says(case.row), usage=Usage(20, 5)) for case in cases]

    def _answer(self, what, cases):
        if self.dead:
            raise ServerError(f"{self.name} is away")
        self.seen.append((what, list(cases)))
