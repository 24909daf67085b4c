"""A plugin for tests: methods that each break one promise of their kind."""
