"""Methods of training that are no step rule: hooks of one training loop."""
