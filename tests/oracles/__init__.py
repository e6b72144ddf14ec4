"""What the package is held against; nothing here shares code or idea with it."""
