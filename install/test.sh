#!/usr/bin/env bash
# Sets the machine up and runs the static checks and the whole test suite: sudo install/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
install/setup.sh test
export PATH="$PWD/.venv/bin:$PATH:$PWD/.tools/host/usr/bin:$PWD/.tools/host/usr/sbin"
make check
# Two at a time, file by file: more than half of the suite waits for disks, daemons and containers.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
