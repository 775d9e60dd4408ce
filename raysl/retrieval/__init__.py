"""Read stored embeddings, and find neighbours and near-duplicates among them."""
