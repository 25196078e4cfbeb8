"""Samplers: how completions are drawn from a policy."""
