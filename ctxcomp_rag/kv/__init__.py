"""Cache entries: what attends to them, which of them to keep, and a cache of bounded size made of both."""
