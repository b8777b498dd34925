"""Stage 3: nuclei to single-cell images with their measurements, and the table that holds them."""
