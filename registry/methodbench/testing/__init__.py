"""What plugin authors and the test suite run against a method."""
