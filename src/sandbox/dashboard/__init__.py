"""The dashboard: web pages on the API's port."""
