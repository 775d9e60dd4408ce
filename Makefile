.PHONY: setup format check test test-all

setup:
	uv sync --all-groups

format:
	uv run ruff format .
	uv run ruff check --fix .

check:
	uv run ruff format --check .
	uv run ruff check .
	uv run mypy
	uv run codespell

test:  # no cluster: under a minute
	uv run pytest -m "not ray and not distributed and not slow"

test-all:
	uv run pytest
