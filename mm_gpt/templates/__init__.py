"""Templates: how chats and images are written into a prompt, and the sandbox that strangers' templates run in."""
