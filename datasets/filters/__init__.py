"""Filters: rules on text, images and documents, language, personal data."""
