"""`raysl benchmark`: measure input, plan, loss and embedding, to size a machine or cluster."""
