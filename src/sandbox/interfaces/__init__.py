"""Floor 2: what control and runners ask of their equipment, as Protocols and small records."""
