#!/usr/bin/env bash
# Prepares a Debian 12 or Ubuntu machine for the demo, the tests and the benchmarks: install/setup.sh [demo|test|bench|boot]
#
# Nothing of the host's is touched. Packages that bring a service (containerd, docker-registry) are unpacked into
# .tools/ and never installed, so no unit is added, replaced, enabled or restarted; a containerd or runc that is
# already on the machine, Docker's containerd.io included, is used as a binary. Python packages go into .venv/.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${1:-test}
tools=$PWD/.tools
log=$tools/setup.log
die() { printf 'setup: error: %s\n' "$1" >&2; shift; printf '       %s\n' "$@" >&2; exit 1; }
say() { printf 'setup: %s\n' "$*" >&2; }
quietly() { "$@" >>"$log" 2>&1 || die "this command failed: $*" "its output is in $log"; }

case $profile in demo | test | bench | boot) ;; *) echo "usage: install/setup.sh [demo|test|bench|boot]" >&2; exit 2 ;; esac
[ "$(id -u)" = 0 ] || die "mounting file systems and starting containers needs root" "run it again with sudo"
command -v apt-get >/dev/null || die "this machine has no apt-get" "Debian 12, Ubuntu 22.04 and later are supported"
mkdir -p "$tools"
: >"$log"
export DEBIAN_FRONTEND=noninteractive
apt_get() { quietly apt-get -q -o DPkg::Lock::Timeout=300 "$@"; }

updated=
update_once() {
  [ -n "$updated" ] || { say "reading the package lists"; apt_get update; updated=1; }
}

# Packages without a service: tools and libraries only.
packages=(ca-certificates skopeo python3-venv busybox-static erofs-utils libseccomp2 xz-utils)
if [ "$profile" != demo ]; then
  packages+=(git make umoci fio strace attr acl libcap2-bin iproute2 openssl zstd)
  # The portable mount: pyfuse3 is built here, fusermount3 mounts for a user who is not root.
  packages+=(fuse3 libfuse3-dev pkg-config gcc python3-dev)
  # The server itself is in Debian's redis-tools, as redis-check-rdb; the package redis-server would only add the service.
  command -v redis-server >/dev/null || packages+=(redis-tools)
fi
if [ "$profile" = test ]; then
  packages+=(chromium chromium-driver) # the page of floe ui is tried in a browser
fi
if [ "$profile" = boot ]; then
  packages+=(debootstrap qemu-system-x86 e2fsprogs)
fi
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  update_once
  say "installing ${missing[*]}"
  apt_get install -y --no-install-recommends "${missing[@]}"
fi

# unpack NAME FOLDER [APT OPTION...]: the files of a package, its maintainer scripts not run.
unpack() {
  local name=$1 folder=$2 work
  shift 2
  work=$(mktemp -d "$tools/unpack.XXXXXX")
  chmod 755 "$work" # apt downloads as its own user
  (cd "$work" && quietly apt-get -q "$@" download "$name")
  mkdir -p "$folder"
  quietly dpkg-deb -x "$work"/*.deb "$folder"
  rm -rf "$work"
}

# tool BINARY PACKAGE: as it is on this machine, else unpacked into .tools/host.
tool() {
  command -v "$1" >/dev/null || [ -x "$tools/host/usr/bin/$1" ] || [ -x "$tools/host/usr/sbin/$1" ] && return
  update_once
  say "unpacking $2 into .tools/host"
  unpack "$2" "$tools/host"
}
tool containerd containerd
tool runc runc
tool docker-registry docker-registry
[ "$profile" != test ] || tool buildah buildah
if [ "$profile" != demo ] && ! command -v redis-server >/dev/null; then
  mkdir -p "$tools/host/usr/bin"
  ln -sfn "$(command -v redis-check-rdb)" "$tools/host/usr/bin/redis-server" # it goes by the name it is called by
fi

# A second, newer containerd, for the benchmarks also soci-snapshotter, from the newest Debian suite that carries them, by the
# machine's own mirror and keyring; its package lists are kept apart from the machine's.
# newer PACKAGE FOLDER: its files below usr/.
newer() {
  local package=$1 folder=$2 mirror lists options
  # shellcheck disable=SC1091
  [ ! -e "$folder/bin" ] && [ "$(. /etc/os-release && echo "$ID")" = debian ] || return 0
  say "unpacking a newer $package into .tools/${folder##*/}"
  # shellcheck disable=SC2016
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' |
    { grep -v -e security -e backports || true; } | head -n 1) # no match is no reason to end without a word
  [ -n "$mirror" ] || die "no Debian mirror in /etc/apt" "add one, then run it again"
  lists=$tools/newer-suite
  mkdir -p "$lists/lists/partial" "$lists/cache/archives/partial"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror forky main" >"$lists/sources.list"
  options=(-o "Dir::Etc::sourcelist=$lists/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$lists/lists" -o "Dir::Cache=$lists/cache" -o APT::Sandbox::User=root)
  quietly apt-get -q "${options[@]}" update
  unpack "$package" "$folder.new" "${options[@]}"
  rm -rf "$folder" "$lists"
  mv "$folder.new/usr" "$folder"
  rm -rf "$folder.new"
}
[ "$profile" = demo ] || newer containerd "$tools/containerd-2.1"
[ "$profile" != bench ] || newer soci-snapshotter "$tools/soci"

# Python: one virtual environment, made again when what it must hold has changed.
stamp=$tools/venv.${profile/boot/test} # the same packages
wanted=$(cat pyproject.toml install/setup.sh | sha256sum)
if [ ! -x .venv/bin/floe ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  say "installing Python packages into .venv (a minute or two)"
  [ -x .venv/bin/python ] || quietly "${PYTHON:-/usr/bin/python3}" -m venv .venv
  case $profile in test | boot) extra=dev ;; *) extra=$profile ;; esac
  quietly .venv/bin/python -m pip install -q -e ".[$extra]"
  echo "$wanted" >"$stamp"
fi
# BentoML apart from it: what Floe reads of Bentos is compared with what the real package writes.
if [ "$profile" = test ] && [ ! -x "$tools/bentoml/bin/bentoml" ]; then
  say "installing BentoML into .tools/bentoml (half a minute)"
  rm -rf "$tools/bentoml"
  quietly "${PYTHON:-/usr/bin/python3}" -m venv "$tools/bentoml"
  quietly "$tools/bentoml/bin/python" -m pip install -q 'bentoml>=1.4,<1.5' huggingface_hub
fi
for module in erofs fuse overlay loop; do modprobe "$module" 2>/dev/null || true; done
for fs in erofs fuse overlay; do
  grep -qw "$fs" /proc/filesystems || die "this kernel has no $fs" "load its module (on Ubuntu: apt install linux-modules-extra-\$(uname -r))"
done
if [ "$profile" = boot ]; then
  [ "$(uname -m)" = x86_64 ] || die "the machine that boots is an x86-64 one, and this is none" "run the other tests here"
  say "making a Debian 12 that boots (two minutes, unless it is there)"
  quietly tests/boot/make-image.sh "$tools/boot"
fi
say "ready"
