"""Shared torch machinery: whatever two methods need lives here once. Importing this package imports torch."""
