"""A plugin for tests: methods that behave, and methods that misbehave in every way that a cell can."""
