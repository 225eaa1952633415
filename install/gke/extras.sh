#!/bin/sh
# What a GKE node needs besides bootstrap-node.sh: extras.sh install ROOT [HANDLER] | remove ROOT
#
# - GKE writes containerd's configuration anew at every boot, and then restarts containerd; a drop-in of containerd's unit puts
#   Floe back before each start of it.
# - A planted cache (plant-cache.sh) on a second disk is copied to the node's cache before the pack filesystem starts.
#
# ROOT: / or where the host's / is mounted. Units are read anew by whoever starts them next (systemctl daemon-reload).
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
usage() {
  echo "usage: extras.sh install ROOT [HANDLER] | remove ROOT" >&2
  exit 2
}
if [ $# -lt 2 ] || [ ! -d "$2/etc" ]; then usage; fi
root=${2%/} handler=${3:-runc-floe}
case $handler in *[!a-z0-9-]*) usage ;; esac

units=$root/etc/systemd/system
drop_in=$units/containerd.service.d
place=$root/opt/floe-planted

put() { # FILE MODE: standard input becomes that file, at once
  cat >"$1.new"
  chmod "$2" "$1.new"
  mv "$1.new" "$1"
}

case $1 in
install)
  mkdir -p "$drop_in" "$place" "$units/floe-packfs.service.wants"
  runtime="--runtime $handler"
  [ "$handler" != none ] || runtime=
  sed "s/ @RUNTIME@/${runtime:+ $runtime}/" "$here/containerd.conf" | put "$drop_in/50-floe.conf" 644
  put "$place/copy-cache.sh" 755 <"$here/copy-cache.sh"
  put "$units/floe-planted.service" 644 <"$here/floe-planted.service"
  ln -sfn /etc/systemd/system/floe-planted.service "$units/floe-packfs.service.wants/floe-planted.service"
  ;;
remove)
  rm -f "$drop_in/50-floe.conf" "$place/copy-cache.sh" "$units/floe-planted.service" \
    "$units/floe-packfs.service.wants/floe-planted.service"
  rmdir "$drop_in" "$place" "$units/floe-packfs.service.wants" 2>/dev/null || true # others may have put something there
  ;;
*) usage ;;
esac
