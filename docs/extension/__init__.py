"""What the documentation adds to Sphinx: tables from the rules, and drawings."""
