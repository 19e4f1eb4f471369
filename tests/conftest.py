"""Settings that every test shares."""

import os

# The test models are so small that threads cost more than they bring; server processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
