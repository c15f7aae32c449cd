"""The networks: pure Flax Linen modules."""
