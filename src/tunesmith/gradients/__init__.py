"""What may touch gradients between backward and the optimizer's step."""
