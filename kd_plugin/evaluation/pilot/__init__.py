"""Which method for this task and this budget: short runs of each at equal cost.

settings.py has what is asked; trials.py one run: its recipe, its cost, what it reached; run.py goes from the settings
to the outcome: the steps that the budget allows, learning rates, seeds; report.py says what was found.
"""
