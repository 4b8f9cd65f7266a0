"""Demo without internet access: a scripted model and a git server."""
