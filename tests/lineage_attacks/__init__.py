"""Attacks on the license gate and on records, as one table: what is tried, the verdict that is right, the verdict seen.

``python -m tests.lineage_attacks`` prints the table. To add a row, write one ``attack(...)`` in a ``rows_*.py``; a new
file of rows is imported in ``table.py``.
"""
