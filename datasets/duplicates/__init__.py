"""Duplicates: near copies of texts and of images."""
