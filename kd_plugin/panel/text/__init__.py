"""What teachers that write, and verifiers, give the on-policy step.

corrections.py makes rows of what they corrected, preference.py compares these with the responses, reward.py weighs the
divergence by a verifier, economics.py counts what all of it took.
"""
