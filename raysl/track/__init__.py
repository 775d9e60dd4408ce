"""Record runs in their run folder and in MLflow."""
