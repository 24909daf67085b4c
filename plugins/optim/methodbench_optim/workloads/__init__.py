"""What the optimizers are compared on: analytic landscapes and small trainings, seconds on one CPU thread."""
