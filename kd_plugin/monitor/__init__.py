"""What is seen of an on-policy run: ``metrics`` to log, an ``alarm`` on rollouts, ``traces`` that people read."""
