"""The tests; what they compare with is in `oracles`, what they share in `support`."""
