"""``kd-plugin run``: one YAML file from data to a checked student; what is done is not done again.

command.py is the command, and runs the recipes that a pilot or a ladder makes; sections.py has what a recipe may say
and the stages that it asks for, stages.py runs them, plan.py says before that what they take and what terms allow.
"""
