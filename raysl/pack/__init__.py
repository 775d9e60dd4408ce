"""`raysl pack` and `raysl data`: plain functions that look at a source and rewrite it."""
