"""Encoders to and from the formats of others, each checked before its file appears."""
