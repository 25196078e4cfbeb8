"""Metrics over rows, each with its interval, and the run that measures base and tuned alike."""
