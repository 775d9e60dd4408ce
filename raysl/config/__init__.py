"""Strict, frozen, typed configuration: YAML becomes pydantic models; errors name the key."""
