#!/bin/sh
# All wheels that a node needs, for every Python that a node may have: install/kubernetes/wheelhouse.sh DIR [MACHINE]
#
# For the installer image, and for `bootstrap-node.sh --offline DIR` on nodes without a network. MACHINE: x86_64 or
# aarch64 (this machine's). Nothing is compiled: a package without a wheel for one of these is an error.
set -eu

pythons="3.10 3.11 3.12 3.13"                       # Ubuntu 22.04, Debian 12, Ubuntu 24.04, Debian 13
# What packages want of older Pythons alone: pip asks the Python that runs it, and not the one that it downloads for.
of_older="tomli async-timeout typing-extensions"
glibcs="2_28 2_27 2_26 2_25 2_24 2_17 2_12 2_5"      # the oldest of these systems has 2.35

die() { printf 'wheelhouse: error: %s\nwheelhouse: hint: %s\n' "$1" "$2" >&2; exit 1; }

if [ $# -lt 1 ] || [ $# -gt 2 ] || [ -z "$1" ]; then
  echo "usage: wheelhouse.sh DIR [x86_64|aarch64]" >&2
  exit 2
fi
out=$1
machine=${2:-$(uname -m)}
case $machine in x86_64 | aarch64) ;; *) die "there are no wheels for $machine" "x86_64 and aarch64 are what Floe runs on" ;; esac
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
[ -f "$root/pyproject.toml" ] || die "$root is no checkout of Floe" "run the wheelhouse.sh of a whole checkout"
python=${PYTHON:-python3}
"$python" -m pip --version >/dev/null 2>&1 || die "$python has no pip" "apt-get install python3-pip, or PYTHON=..."

mkdir -p "$out"
out=$(CDPATH='' cd -- "$out" && pwd)
# One version of Floe, and the packages of no other.
[ -z "$(ls "$out")" ] || die "$out is not empty" "name a new directory"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Of a copy: a build leaves things behind, and picks up what earlier ones have left.
for name in pyproject.toml README.md LICENSE floe fuse snapshotter protos; do cp -R "$root/$name" "$work/"; done
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$out" "$work"

platforms="--platform manylinux1_$machine --platform manylinux2010_$machine --platform manylinux2014_$machine"
for glibc in $glibcs; do platforms="$platforms --platform manylinux_${glibc}_$machine"; done
for version in $pythons; do
  # pip itself too, for systems whose Python comes without it.
  # shellcheck disable=SC2086 # the platforms and packages are words
  "$python" -m pip download --quiet --disable-pip-version-check --only-binary :all: --implementation cp \
    --python-version "$version" $platforms --dest "$out" "$out"/floe-*-py3-none-any.whl pip $of_older
done
