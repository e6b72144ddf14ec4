"""What people do with the scores: masks, patterns, budgets, and networks with fewer channels."""
