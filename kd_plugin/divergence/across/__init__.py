"""A student and a teacher with different vocabularies.

folding.py compares those that share a part, byte_marginals.py those of two tokenizers, by the sums of byte_masses.py
over the vocabularies of sorted_tokens.py.
"""
