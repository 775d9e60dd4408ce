"""Run raysl on Ray: the only package that imports it, with one file for each Ray library."""
