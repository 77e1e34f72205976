"""probes.patching.patching"""
