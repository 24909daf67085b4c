"""Plan, identity, workers and executors."""
