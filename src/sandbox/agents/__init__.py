"""Agents that Sandbox can run: one package per agent."""
