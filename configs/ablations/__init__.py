"""The controlled comparisons of the paper at full scale, each a diff of `baseline`."""
