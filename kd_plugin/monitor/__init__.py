"""What is seen of an on-policy run: metrics.py is logged, traces.py is for people, watch.py acts; run.py runs it."""
