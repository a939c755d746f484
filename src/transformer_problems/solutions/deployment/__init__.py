"""Trained models as files and services: exported, quantised and run on machines without PyTorch."""
