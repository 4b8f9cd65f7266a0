"""Floor 5: what the demo shows itself with, without the internet: a scripted model and a git server."""
