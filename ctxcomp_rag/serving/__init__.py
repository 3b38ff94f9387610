"""Serving an index to many callers: an OpenAI-compatible server (extra `serve`) and an adapter for vLLM."""
