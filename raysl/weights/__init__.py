"""Files of weights, of raysl and of others: read without running code, told apart."""
