"""How far a student's next-token distribution is from a teacher's, in nats a token.

``spec`` names a divergence, ``reference`` states each one as its formula, ``fused`` computes it for a panel
without ever holding full logits, ``sparse`` for the tokens that a cache or a server kept. ``projection``, ``tiles``
and ``listed`` are their inner parts; ``finite`` holds the check for NaN.
"""

from kd_plugin.divergence.finite import require_finite
from kd_plugin.divergence.fused import PanelGroup, PanelLoss, TeacherTerm, fused_panel_divergence
from kd_plugin.divergence.listed import Tail
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
