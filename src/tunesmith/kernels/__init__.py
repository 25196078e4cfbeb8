"""Attention over segments, and what later replaces a slow path of an unpatched model."""
