"""Inspect a source and rewrite it as shards, for `raysl data` and `raysl pack`; plain functions."""
