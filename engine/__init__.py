"""The engine: drafts, verifies, commits. Knows no server."""

import os

# Before torch is imported. Its threads wait for each other at the end of every operation; libgomp lets them
# turn for milliseconds there, and where another process wants the same cores, whole seconds of a step go by
# so. After some ten microseconds they sleep: as fast where nobody disturbs.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
