"""Batch systems that queue and run workers on a cluster: Slurm, and a stand-in that starts local processes."""
