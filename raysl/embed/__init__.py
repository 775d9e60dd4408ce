"""`raysl embed`, `search` and `duplicates`: write features, and find images by them."""
