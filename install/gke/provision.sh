#!/usr/bin/env bash
# Inside the machine that becomes a node image: provision.sh WHEELS HANDLER. Run by floe-node.pkr.hcl.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
die() { printf 'provision: error: %s\nprovision: hint: %s\n' "$1" "$2" >&2; exit 1; }

[ $# = 2 ] || { echo "usage: provision.sh WHEELS HANDLER" >&2; exit 2; }
wheels=$1 handler=$2
[ "$(id -u)" = 0 ] || die "this needs root" "run it with sudo"

# What the base image does at its first start is done first; it has its own idea of packages and users.
if command -v cloud-init >/dev/null; then
  cloud-init status --wait >/dev/null || true # an error of its own is no concern of ours
fi

# A disk image meets its disks at its first start: empty local SSDs may be formatted then, and at later ones.
"$here/../bootstrap-node.sh" --image --yes --offline "$wheels" --runtime-handler "$handler" --disks auto --format
"$here/extras.sh" install / "$handler"

floe version
for unit in floe-packfs floe-snapshotter; do
  systemctl is-enabled --quiet "$unit" || die "$unit is not enabled" "see what bootstrap-node.sh said above"
done

# The machines made from it are others: their names, their keys, and what cloud-init has to do for them.
rm -rf /tmp/floe
rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
truncate -s 0 /etc/machine-id
if command -v cloud-init >/dev/null; then cloud-init clean --logs; fi
sync
