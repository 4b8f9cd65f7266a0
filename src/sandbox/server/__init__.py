"""The server: admits, launches, follows and recovers tasks, and answers requests about them."""
