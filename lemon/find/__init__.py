"""True neighbours: the nuclei whose vectors are nearest to one's, over all slides."""
