"""Placements: where runners are started. One package per placement."""
