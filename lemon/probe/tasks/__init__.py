"""Benchmarks of labelled nuclei, one file a data set: licence, classes, filters, layout on disk."""
