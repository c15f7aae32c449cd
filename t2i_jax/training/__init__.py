"""Training: the step, the optimiser, the state and its average, the loop, the metrics."""
