"""Runs workers as batch jobs of Slurm."""
