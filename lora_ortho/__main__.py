"""``python -m lora_ortho`` is ``lora-ortho``."""

import sys

from lora_ortho.cli import main

sys.exit(main())
