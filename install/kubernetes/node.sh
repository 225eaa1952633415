#!/bin/sh
# What the pods of install/kubernetes do on their node: node.sh install [FLAG...] | uninstall [FLAG...] | watch | idle
#
#   install    bootstrap-node.sh on the host, with these flags; settings come from FLOE_* variables
#   uninstall  takes it back; fails, and changes nothing, while containers of this node need Floe
#   watch      tells by the file $FLOE_NODE_STATE whether this node's daemons serve, and for which runtime handler; never ends
#   idle       never ends
#
# Pods come and go; Floe runs on the host, by its systemd. So ending a pod ends nothing of Floe.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
host=${FLOE_NODE_HOST:-/host}           # where the host's / is mounted
secrets=${FLOE_NODE_SECRETS:-/secrets}  # where the Secret is mounted, if there is one
wheels=${FLOE_NODE_WHEELS:-/wheels}
state=${FLOE_NODE_STATE:-/state/ready}
bootstrap=${FLOE_NODE_BOOTSTRAP:-$here/../bootstrap-node.sh}
extras=$here/../gke/extras.sh
# These are this script's; what is left of FLOE_* are Floe's own settings.
unset FLOE_NODE_HOST FLOE_NODE_SECRETS FLOE_NODE_WHEELS FLOE_NODE_STATE FLOE_NODE_BOOTSTRAP

placed=/etc/floe/secrets
record=/var/lib/floe/node/record.json # bootstrap-node.sh's
units="floe-packfs floe-snapshotter"
csi=floe-csi # where --csi asked for it
with_secrets="$units $csi floe-agent"

say() { printf 'floe-node: %s\n' "$*"; }
die() { printf 'floe-node: error: %s\nfloe-node: hint: %s\n' "$1" "$2" >&2; exit 1; }

# The Secret's keys, as files that root alone reads; what is no longer in it goes. Each is replaced at once.
place_secrets() {
  # Without a Secret kubelet mounts an empty directory.
  if [ -z "$(ls "$secrets" 2>/dev/null)" ]; then
    [ ! -d "$host$placed" ] || remove_secrets
    return 0
  fi
  (
    umask 077
    mkdir -p "$host$placed"
    for file in "$secrets"/*; do
      [ -f "$file" ] || continue
      name=${file##*/}
      cmp -s "$file" "$host$placed/$name" && continue
      cp "$file" "$host$placed/.$name.new"
      mv "$host$placed/.$name.new" "$host$placed/$name"
      say "placed $placed/$name"
    done
    for file in "$host$placed"/*; do
      [ -e "$file" ] || continue
      [ -f "$secrets/${file##*/}" ] || { rm -f "$file"; say "removed $placed/${file##*/}"; }
    done
  )
  for unit in $with_secrets; do
    folder=$host/etc/systemd/system/$unit.service.d
    if [ -f "$host$placed/aws-credentials" ]; then
      mkdir -p "$folder"
      # A file and no variables: it is read again when the server refuses what was in it.
      printf '[Service]\nEnvironment=AWS_SHARED_CREDENTIALS_FILE=%s\n' "$placed/aws-credentials" >"$folder/secrets.conf.new"
      mv "$folder/secrets.conf.new" "$folder/secrets.conf"
    else
      remove_drop_in "$folder"
    fi
  done
}

remove_drop_in() {
  rm -f "$1/secrets.conf"
  rmdir "$1" 2>/dev/null || true
}

remove_secrets() {
  rm -rf "${host:?}$placed"
  rmdir "$host/etc/floe" 2>/dev/null || true # the settings may be in it
  for unit in $with_secrets; do remove_drop_in "$host/etc/systemd/system/$unit.service.d"; done
}

# GKE configures containerd by such a unit, at every boot.
is_gke() { [ -e "$host/etc/systemd/system/kube-node-configuration.service" ]; }

# handler_of FLAG...: what --runtime-handler says.
handler_of() {
  handler=none
  while [ $# -gt 0 ]; do
    case $1 in
    --runtime-handler=*) handler=${1#*=} ;;
    --runtime-handler) handler=${2:-none} ;;
    esac
    shift
  done
  printf '%s' "$handler"
}

on_host() { nsenter --target 1 --mount -- "$@"; }

serves() {
  for unit in $units; do
    # Both are Type=notify with a watchdog: active is who serves. is-active of several is content with one.
    on_host systemctl is-active --quiet "$unit" || return 1
  done
  ! on_host systemctl is-enabled --quiet "$csi" || on_host systemctl is-active --quiet "$csi"
}

# The runtime handler that this node's containerd was configured for; nothing where that is all pods, or Floe came here
# by hand. bootstrap-node.sh knows, whether it ran in this pod with an overlay's flags or made the node's image.
handler_on_host() {
  on_host cat "$record" 2>/dev/null | sed -n 's/^ *"runtime_handler": "\([^"]*\)".*/\1/p' | sed '/^none$/d'
}

watch() {
  was=
  trap 'exit 0' TERM INT
  while :; do
    if serves; then
      now=yes
      [ "$now" = "$was" ] || { handler_on_host >"$state.new" && mv "$state.new" "$state"; }
    else
      now=no
      rm -f "$state"
    fi
    [ "$now" = "$was" ] || say "the daemons serve: $now"
    was=$now
    sleep 10 &
    wait $!
  done
}

take_back() {
  # Without the drop-in first: else containerd's restart would put Floe back.
  if [ -n "$before" ]; then "$extras" remove "$host" && on_host systemctl daemon-reload || return 1; fi
  "$bootstrap" --host-root "$host" --uninstall --yes "$@"
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
install)
  [ -d "$host/etc" ] || die "$host is no host's root" "mount the node's / there (hostPath)"
  place_secrets
  # First: a planted cache is copied before the pack filesystem starts.
  ! is_gke || "$extras" install "$host" "$(handler_of "$@")"
  exec "$bootstrap" --host-root "$host" --offline "$wheels" --yes --declarative "$@"
  ;;
uninstall)
  [ -d "$host/etc" ] || die "$host is no host's root" "mount the node's / there (hostPath)"
  drop_in=$host/etc/systemd/system/containerd.service.d/50-floe.conf
  before=
  if [ -e "$drop_in" ]; then
    before=$(sed -n 's/^ExecStartPre=.* --runtime //p' "$drop_in")
    before=${before:-none}
  fi
  code=0
  take_back "$@" || code=$?
  if [ "$code" != 0 ]; then
    [ -z "$before" ] || "$extras" install "$host" "$before"
    exit "$code"
  fi
  remove_secrets
  ;;
watch) watch ;;
idle)
  trap 'exit 0' TERM INT
  sleep infinity &
  wait $!
  ;;
*)
  echo "usage: node.sh install [FLAG...] | uninstall [FLAG...] | watch | idle" >&2
  exit 2
  ;;
esac
