"""Speed beside peers and physical limits: `python -m benchmarks NAME… [--quick] [--json FILE]`."""
