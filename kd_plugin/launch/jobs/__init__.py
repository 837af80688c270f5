"""What starts engines, servers and trainers of one run on a cluster.

parts.py says what such a run is made of, slurm.py and kubernetes.py write it for each of the two, write.py both.
"""
