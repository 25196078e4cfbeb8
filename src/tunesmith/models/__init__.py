"""Base models: where they come from, how they are loaded, and the one forward they share."""
