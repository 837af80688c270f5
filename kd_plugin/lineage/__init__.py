"""License lineage: who taught a checkpoint, under which terms, and what is owed."""
