"""Opening files: local, remote, packed, archives, and rows of JSON, CSV and parquet."""
