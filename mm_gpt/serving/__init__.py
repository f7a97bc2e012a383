"""Serving: the model behind a web page. Each module needs its own extra package and imports it only when it runs."""
