"""Where other compilers, runtimes and tools meet fxpath."""
