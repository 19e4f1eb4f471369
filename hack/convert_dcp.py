"""The same as `python -m vdiff_kserve.convert`, where a script is wanted."""

import sys

from vdiff_kserve.convert import main

if __name__ == "__main__":
    sys.exit(main())
