"""Searching with a trained encoder: the search page, and embeddings as a file."""
