"""The server: accepts, launches, follows and recovers tasks, and answers requests about them."""
