"""Where a run meets Ray: the only room that imports it, one file a Ray library."""
