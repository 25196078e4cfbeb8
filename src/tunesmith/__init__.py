"""tunesmith: one system for the whole life of a fine-tuned model."""

__version__ = "0.1.0"
