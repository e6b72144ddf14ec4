"""Results as tables, pictures and pages: plain data in, text and files out."""
