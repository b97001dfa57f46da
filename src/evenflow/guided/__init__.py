"""Structured output: what a text must be, as masks over the next token. The engine of grammars is llguidance."""
