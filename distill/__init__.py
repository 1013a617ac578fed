"""Distilled datasets: a small set of synthesized images that trains like the whole."""
