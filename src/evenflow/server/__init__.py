"""The HTTP front: an OpenAI-compatible API over asyncio, its metrics and its traces. Imports no torch."""
