"""Standard tasks of lm-evaluation-harness, in a package of their own: metrics are found without importing it."""
