"""Tokens: who may ask the server for what."""
