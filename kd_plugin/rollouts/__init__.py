"""Rollout engines: who generates the responses that teachers score, with which weights.

``decoding`` is a decoding loop for transformers' ``generate``, ``interleaved`` lets a panel replace the student's
tokens, ``responses`` says where responses end and which tokens count, ``rows`` who fills a row and how rows are padded.
"""
