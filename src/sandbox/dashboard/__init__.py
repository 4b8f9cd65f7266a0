"""The dashboard: pages for people at a browser, on the port of the API."""
