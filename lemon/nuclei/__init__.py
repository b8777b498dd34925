"""Stage 2: nuclei in tissue regions, by a network (HoverFast) or by the hematoxylin stain alone."""
