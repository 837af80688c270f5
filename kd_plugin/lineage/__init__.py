"""License lineage: who taught a checkpoint, under which terms, and what is owed.

registry (licenses.toml) -> discovery -> graph -> policy -> shipping -> record -> write; verify recomputes it all.
"""

from kd_plugin.lineage.declared import outputs_record
from kd_plugin.lineage.hashing import weight_files
from kd_plugin.lineage.record import load_record
from kd_plugin.lineage.run import RunLineage
from kd_plugin.lineage.sources import Source
from kd_plugin.lineage.verdict import NO_ADVICE, Duty, Finding, Verdict
from kd_plugin.lineage.verify import Problem, VerifyReport, verify

__all__ = [
    "NO_ADVICE",
    "Duty",
    "Finding",
    "Problem",
    "RunLineage",
    "Source",
    "Verdict",
    "VerifyReport",
    "load_record",
    "outputs_record",
    "verify",
    "weight_files",
]
