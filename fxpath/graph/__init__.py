"""The vocabulary of lifted graphs, and how a graph in it is written, read and checked."""
