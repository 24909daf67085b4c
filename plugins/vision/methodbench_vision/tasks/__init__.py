"""Image tasks and the pictures that they use."""
