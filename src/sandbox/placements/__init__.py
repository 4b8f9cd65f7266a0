"""Where runners are started: one package per placement."""
