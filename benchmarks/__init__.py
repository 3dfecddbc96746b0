"""Microbenchmarks: what a merge costs beside its peers, on this machine."""
