"""Floor 3: where attempts are carried out."""
