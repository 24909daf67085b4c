"""methodbench plugin: sparse."""
