"""Embeddings of nuclei, and the files that scanpy, QuPath and SpatialData open."""
