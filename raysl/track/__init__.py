"""Record runs: their folder, their metrics, their MLflow run."""
