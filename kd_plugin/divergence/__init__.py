"""How far a student's next-token distribution is from a teacher's, in nats per token. Mathematics only.

spec.py names the divergences and modes.py the ways to combine teachers; reference.py computes one from full logits, the
oracle of the others. fused.py is the loss of a panel without ever holding full logits; sparse.py is the loss of the
tokens that a cache or a server kept, listed.py what is known of them; sampled.py is that of the sampled token alone.
projection.py, tiles.py and gradient.py are inner parts of all; compiled/ does the work on tiles by functions that a
compiler fuses. across/ compares different vocabularies. objective.py is offline KD's loss of a batch.
"""

from kd_plugin.divergence.fused import PanelGroup, PanelLoss, TeacherTerm, fused_panel_divergence
from kd_plugin.divergence.listed import Tail
from kd_plugin.divergence.projection import require_finite
from kd_plugin.divergence.sparse import SparseLoss, fused_sparse_divergence
from kd_plugin.divergence.spec import Divergence

__all__ = [
    "Divergence",
    "PanelGroup",
    "PanelLoss",
    "SparseLoss",
    "Tail",
    "TeacherTerm",
    "fused_panel_divergence",
    "fused_sparse_divergence",
    "require_finite",
]
