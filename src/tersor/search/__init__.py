"""Search: a budget goes in, the smallest or fastest model within it comes out. Recipes are tried and judged."""
