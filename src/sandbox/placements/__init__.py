"""Placements, which start runners. One package per placement."""
