"""One run from its configuration to its encoder: recipe, worker, Ray, report."""
