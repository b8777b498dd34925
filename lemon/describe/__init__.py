"""What a cluster or a class is: how its nuclei differ from the others, in measures that have names and units."""
