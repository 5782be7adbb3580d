"""Metrics of a trained flow: likelihood, Fréchet distance and its family, classification, outlier detection."""
