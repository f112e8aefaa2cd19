"""`python -m oisd_kernels.cuda_build`: the command that compiles csrc/, under the name of 0.1."""

import sys

from oisd_kernels.cuda.build import main

if __name__ == "__main__":
    sys.exit(main())
