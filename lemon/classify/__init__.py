"""A class for every nucleus from a few labels."""
