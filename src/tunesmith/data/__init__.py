"""From files to tokens with loss weights: read, convert, render, check, split, store, pack."""
