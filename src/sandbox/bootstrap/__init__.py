"""Builds and starts server, runner and worker from their components. Also: settings, doctor, backup, machine setup."""
