"""Image models: what loads or trains each of them."""
