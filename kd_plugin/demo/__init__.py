"""``kd-plugin demo``: a small real model distilled both ways, with its lineage, in minutes on two CPU cores.

``config`` holds the settings, ``prompts`` the bundled questions, ``model`` finds the teacher and cuts the
student, ``state`` keeps two runs apart, ``stages`` does the work, ``evaluate`` and ``report`` show what it did.
"""
