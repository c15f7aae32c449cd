"""External weights: their files, their names, and ours."""
