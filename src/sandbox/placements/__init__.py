"""Placements, which start runners, one package per placement; and the client of runners that placements share."""
