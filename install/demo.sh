#!/usr/bin/env bash
# Sets the machine up and shows Floe: sudo install/demo.sh [--model-mib N] [--json]
set -euo pipefail
cd "$(dirname "$0")/.."
install/setup.sh demo
export PATH="$PWD/.venv/bin:$PATH:/usr/sbin:$PWD/.tools/host/usr/bin:$PWD/.tools/host/usr/sbin"
exec .venv/bin/python install/demo.py "$@"
