"""Draw the pictures and HTML pages that report on runs, sweeps, pipelines and evaluations."""
