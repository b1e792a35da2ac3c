"""What decoding runs on the devices: pure functions over a batch of rows, and their programs."""
