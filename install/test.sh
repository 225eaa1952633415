#!/usr/bin/env bash
# Sets the machine up and runs the static checks and the whole test suite: sudo install/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
install/setup.sh test
export PATH="$PWD/.venv/bin:$PATH:$PWD/.tools/host/usr/bin:$PWD/.tools/host/usr/sbin"
make check
exec .venv/bin/python -m pytest "$@"
