"""What a run needs, before it is started: memory, time and cost, from the shape of its models."""
