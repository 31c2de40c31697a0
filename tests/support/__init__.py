"""Helpers of the tests; files here hold no tests themselves."""
