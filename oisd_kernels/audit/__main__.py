"""`python -m oisd_kernels.audit`."""

import sys

from oisd_kernels.audit import main

sys.exit(main())
