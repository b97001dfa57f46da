"""Mechanism: turns a StepPlan into sampled tokens. Decides nothing about who runs."""
