"""An HTTP server that speaks OpenAI's protocol: `app` has the routes, `run` starts it.

A request goes through `requests` (checked fields), `prompts` (images fetched, chats rendered), `jobs` (the engine
answers, pieces come back), `writers` and `responses` (what is sent).
"""
