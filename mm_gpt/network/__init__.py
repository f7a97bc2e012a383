"""All that this project does on the network: one HTTP client, and the guard against addresses that are not public."""
