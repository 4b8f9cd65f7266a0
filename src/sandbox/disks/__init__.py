"""The disk of an attempt: workspace, home and /tmp together, bounded."""
