"""A plugin that tests copy, change, and run again."""
