"""Checks of the host for `sandbox doctor`."""
