"""The atlas: a map of cells by their embeddings."""
