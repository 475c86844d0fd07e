"""Search: a budget goes in, the smallest or fastest model within it comes out; recipes are tried."""
