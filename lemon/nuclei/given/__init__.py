"""Nuclei that other programs found: their files, read, and laid over the slide that they are of."""
