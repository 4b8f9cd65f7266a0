"""Builds and starts server, runner and worker. Also contains the settings, doctor, backup and machine setup."""
