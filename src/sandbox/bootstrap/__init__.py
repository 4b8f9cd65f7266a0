"""Builds and starts the server, runners and workers. Also contains the settings, doctor, backup and machine setup."""
