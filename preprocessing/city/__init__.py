"""A procedural city and the street-level photos of it: the data set that needs no download."""
