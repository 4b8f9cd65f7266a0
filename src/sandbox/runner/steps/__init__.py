"""The steps of an attempt, one a file, in the order of its life."""
