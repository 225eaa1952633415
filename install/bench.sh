#!/usr/bin/env bash
# Sets the machine up and measures Floe beside native file systems and peers: sudo install/bench.sh [--local] [--json]
set -euo pipefail
cd "$(dirname "$0")/.."
install/setup.sh bench
export PATH="$PWD/.venv/bin:$PATH:/usr/sbin:$PWD/.tools/host/usr/bin:$PWD/.tools/host/usr/sbin"
exec .venv/bin/python -m bench "$@"
