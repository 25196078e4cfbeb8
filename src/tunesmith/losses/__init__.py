"""Pure tensor functions: one paper equation each."""
