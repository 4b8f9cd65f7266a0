"""Placements, which start runners (one package each), and the runner client that they share."""
