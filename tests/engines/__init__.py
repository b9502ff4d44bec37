"""A package, for pytest to end with these tests what they share."""
