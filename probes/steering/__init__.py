"""probes.steering.steering"""
