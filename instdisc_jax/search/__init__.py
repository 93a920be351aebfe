"""Search with a trained encoder: the search page, and export of embeddings to a file."""
