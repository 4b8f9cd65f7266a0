"""An engine for one machine, for tests and trials. `placements/local` is the usual way to run tasks on one machine."""
