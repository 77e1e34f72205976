"""probes.linear.linear_probe"""
