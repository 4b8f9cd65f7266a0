"""What is in a sandbox: images built from declarative files or imported, and which of them a profile means."""
