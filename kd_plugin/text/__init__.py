"""Teachers that only write: they are asked for text, and the student learns from what they wrote.

writers.py says what a writer is and what it answers; server.py asks any OpenAI-compatible server, local.py a model in
this process. spending.py counts tokens and money, up to a ceiling.
"""

from kd_plugin.text.server import ServerWriter
from kd_plugin.text.spending import Budget, Prices
from kd_plugin.text.writers import Answer, Ask, Usage, Writer, in_order

__all__ = ["Answer", "Ask", "Budget", "Prices", "ServerWriter", "Usage", "Writer", "in_order"]
