"""`python3 -I install/bootstrap`: what bootstrap-node.sh starts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bootstrap.main import main

sys.exit(main(sys.argv[1:]))
