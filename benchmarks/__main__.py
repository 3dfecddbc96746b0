"""``python -m benchmarks`` is ``python -m benchmarks.bench_cpu``."""

import sys

from benchmarks.bench_cpu import main

sys.exit(main())
