"""How fast things are: measured in one run, reported as ratios beside the figures."""
