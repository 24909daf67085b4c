"""methodbench plugin: vision."""
