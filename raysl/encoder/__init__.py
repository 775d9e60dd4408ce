"""The encoder file, and the weights of other projects that can fill it."""
