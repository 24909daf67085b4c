"""methodbench plugin: optim."""
