"""Where weights come from: the registry of known files, hub repositories, and fetching both."""
