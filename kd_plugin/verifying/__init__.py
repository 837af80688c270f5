"""Whether an answer is the right one, for tasks whose answers can be verified: in a capture, in training, as a reward.

verifiers.py has the one protocol, the kinds and their YAML form; programs.py runs an answer that is a program, confined
by confined.py, which is the script of the process that it runs in.
"""

from kd_plugin.verifying.programs import Limits, run_checks, run_program
from kd_plugin.verifying.verifiers import Verdict, Verifier, make_verifier, reference, verifier

__all__ = [
    "Limits",
    "Verdict",
    "Verifier",
    "make_verifier",
    "reference",
    "run_checks",
    "run_program",
    "verifier",
]
