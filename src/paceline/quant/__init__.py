"""Weight formats: their table, and bfloat16."""
