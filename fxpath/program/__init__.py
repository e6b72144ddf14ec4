"""The lowered graph as a program, what runs it, and what comes out, with names."""
