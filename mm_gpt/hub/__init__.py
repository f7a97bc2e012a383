"""Where weights come from: the registry of known files, the download, and converters from and to other formats."""
