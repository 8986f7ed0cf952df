"""Deployment targets beside the PyTorch runtime."""
