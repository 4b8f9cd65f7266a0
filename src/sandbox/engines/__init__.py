"""Batch systems of a cluster, which queue and run workers: Slurm, and a stand-in of local processes."""
