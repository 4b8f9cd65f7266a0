"""The commands of `sandbox task`, one a module."""
