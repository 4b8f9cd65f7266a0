"""Bodies and events as clients see them."""
