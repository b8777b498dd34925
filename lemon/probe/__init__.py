"""Probes: what frozen embeddings know of labelled nuclei, by the paper's protocol and by one without leaks."""
