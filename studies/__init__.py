"""Studies: prompts, models and probes composed into claims, each beside its control."""
