"""Stage 1: which slides there are, and their pixels at 0.25 um/px."""
