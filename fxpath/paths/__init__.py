"""The path-lifting written out, path by path, for networks small enough."""
