"""Text teachers that follow a script: in this process, or as what a scripted server writes."""

import json
import re

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


def oracle(answers, lies=False):
    """Return what a scripted server writes as a teacher that knows the answer to each prompt."""

    def write(body):
        request = body["messages"][-1]["content"]
        answer = answers[json.loads(re.search(r"Task:\n(.*)", request)[1])]
        if verdict := re.search(r"Verdict (\w+): score=<", request):
            response = "".join(map(json.loads, re.findall(r"^\| \d+ (.*)", request, re.MULTILINE))).strip()
            right = (response == answer) != lies
            return f"I compare.\nVerdict {verdict[1]}: score={10 * right} first_wrong_step={int(not right)}"
        key = re.search(r"BEGIN (\w+)", request)[1]
        return f"BEGIN {key}\n{'a lie' if lies else answer}\nEND {key}"

    return write
