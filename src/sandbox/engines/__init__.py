"""Engines that run workers: Slurm, and local processes."""
