"""How far a student's next-token distribution is from a teacher's, in nats a token.

``spec`` names a divergence, ``reference`` states each one as its formula, ``fused`` computes it for a panel
without ever holding full logits, ``sparse`` for the tokens that a cache or a server kept.
"""

from kd_plugin.divergence.spec import Divergence

__all__ = ["Divergence"]
