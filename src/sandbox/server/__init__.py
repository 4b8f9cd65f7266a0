"""Floor 4: what the server does with tasks: admit, launch, follow, recover, answer."""
