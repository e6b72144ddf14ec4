"""Rewriting passes, one file each: graph in, graph out."""
