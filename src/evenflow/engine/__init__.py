"""The step loop, and both sides of it: requests in, outputs out. Only the engine knows scheduler and runner."""
