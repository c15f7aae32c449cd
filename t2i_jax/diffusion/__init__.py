"""The mathematics of the flow: path and target, timesteps, guidance, solvers."""
