"""One composed model: its networks' static and array halves, its only forward pass, its checks."""
