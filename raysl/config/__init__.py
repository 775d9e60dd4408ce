"""Strict, frozen, typed configuration: YAML in, pydantic models out, errors that name the key."""
