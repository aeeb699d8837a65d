"""What all records have in common: the JSON they came from, tolerant reading, and what frameworks ask of them."""
