"""How good frozen features are: protocols that never see how they were trained."""
