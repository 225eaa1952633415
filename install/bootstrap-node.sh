#!/bin/sh
# Makes a Floe node of a machine: cache disks, program, settings, units, containerd. `--help` says how, docs/OPERATIONS.md more.
#
# What has to be decided is decided in bootstrap/, which needs nothing but the machine's own Python; this finds that Python.
set -eu

die() {
  printf 'bootstrap-node: error: %s\n' "$1" >&2
  shift
  for hint in "$@"; do printf 'bootstrap-node: hint: %s\n' "$hint" >&2; done
  exit 1
}

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

id=
if [ -r /etc/os-release ]; then
  # shellcheck disable=SC1091
  id=$(. /etc/os-release && printf '%s' "${ID:-}")
fi
if [ "$id" = cos ]; then
  die "Container-Optimized OS has no Python, its /usr is read-only, and what lies in /etc is gone after a reboot" \
    "make the node pool with an Ubuntu image (on GKE: --image-type=ubuntu_containerd)"
fi

for python in python3 python3.13 python3.12 python3.11 python3.10; do
  if command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    # Isolated: neither variables nor the current directory decide what is imported.
    exec "$python" -I -B "$here/bootstrap" "$@"
  fi
done
die "there is no Python 3.10 or later" "apt-get install python3 python3-venv; Debian 12, Ubuntu 22.04 and later have it"
