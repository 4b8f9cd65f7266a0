"""The commands of `sandbox task`, one module each."""
