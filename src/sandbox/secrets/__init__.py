"""Resolves secrets; `redaction` redacts their values from everything that leaves a runner."""
