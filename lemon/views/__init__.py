"""Views: augmented copies of cells, made in batches on the device."""
