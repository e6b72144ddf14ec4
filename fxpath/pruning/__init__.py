"""What people do with path-magnitudes: masks that prune weights, and channels that are removed."""
