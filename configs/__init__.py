"""A file a recipe: each one is the document of what it trains."""
