"""Placement, gradients, the optimizer, precision, memory, checkpoints."""
