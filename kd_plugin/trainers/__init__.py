"""What every subclass of ``transformers.Trainer`` needs of a host: users' own and TRL's.

:mod:`kd_plugin.transformers` puts it before the trainer that a user has, :mod:`kd_plugin.trl` before TRL's. offline.py
and panel.py are the two ways of training, panel_host.py what the panel's step asks of a trainer, run.py the start of a
run and its lineage, evaluation.py its means over tokens and the user's own questions.
"""
