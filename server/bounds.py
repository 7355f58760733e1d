"""What the API bounds of one request. An operator may set less; see `server.settings`."""

from __future__ import annotations

MAX_N = 128
"""The most choices for each prompt; OpenAI's."""
MAX_SEQUENCES = 2048
"""The most sequences that one request may ask for: prompts times choices."""
MAX_STOP_TOKENS = 1024
"""The most `stop_token_ids`: they are looked through for every token."""
MAX_TIMEOUT = 7 * 24 * 3600.0
"""The most seconds that a request may give itself."""
MOST_OBJECTS = 16384
"""The most objects and arrays of a body: to read one costs far more than its two bytes say."""
LARGE_BODIES = 32
"""How many of the largest bodies may be on their way at once, by their bytes."""
