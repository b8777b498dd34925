"""Slides of TCGA from the Genomic Data Commons, kept or curated as they come."""
