"""Benchmarks whose results say how far they are from the physical limit.

Owns workloads, metrics, the client, the limits, reports. No module of it imports torch; those that run the engine in
this process (throughput, latency, ablation) import it when they run. `serving` works against any OpenAI-compatible
server.
"""
