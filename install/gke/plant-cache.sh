#!/usr/bin/env bash
# Fills a node cache with whole models, for a disk that nodes are given: plant-cache.sh DIR MODEL[:TAG]...
#
# DIR: a directory on the disk (ext4, labelled floe-planted), empty or planted before. The store is that of Floe's settings
# (FLOE_STORE, /etc/floe/config.toml). On any machine that can mount, as root; nothing else of it is touched.
#
#     mkfs.ext4 -L floe-planted /dev/disk/by-id/google-planted && mount /dev/disk/by-id/google-planted /mnt
#     FLOE_STORE=gs://BUCKET/PREFIX install/gke/plant-cache.sh /mnt llama:8b && umount /mnt
set -euo pipefail

patience=${PATIENCE:-600} # seconds that the last of a model's content may take after all of it was read
floe=${FLOE:-floe}
say() { printf 'plant-cache: %s\n' "$*" >&2; }
die() { printf 'plant-cache: error: %s\nplant-cache: hint: %s\n' "$1" "$2" >&2; exit 1; }

[ $# -ge 2 ] || { echo "usage: plant-cache.sh DIR MODEL[:TAG]..." >&2; exit 2; }
dir=$1
shift
[ "$(id -u)" = 0 ] || die "mounting a model needs root" "run it again with sudo"
[ -d "$dir" ] || die "there is no directory $dir" "make a file system for it and mount it"
dir=$(cd "$dir" && pwd)
case $(stat -f -c %T "$dir") in
overlayfs | tmpfs) die "$dir lies on $(stat -f -c %T "$dir")" "name a directory on a disk, ext4 or xfs" ;;
esac
while read -r name; do
  case $name in
  trees | packs | tmp | spool | writer.lock | planted.json | lost+found) ;;
  *) die "$dir holds $name, which is none of a cache's" "name an empty directory" ;;
  esac
done < <(find "$dir" -mindepth 1 -maxdepth 1 -printf '%f\n')
command -v "$floe" >/dev/null || die "there is no program $floe" "install Floe first, or say FLOE=..."

run=$(mktemp -d /run/floe-plant.XXXXXX)
export FLOE_CACHE_DIR=$dir FLOE_CACHE_DIRS=none FLOE_RUN_DIR=$run
# Reading all of a model is no start to be remembered; all of a disk that is for nothing else may be used.
export FLOE_COMPLETION=always FLOE_PROFILES=off FLOE_CACHE_SIZE=97% FLOE_CACHE_MIN_FREE=2%

finish() {
  local mounted
  for mounted in "$run"/mnt.*; do
    [ -d "$mounted" ] || continue
    "$floe" umount "$mounted" >/dev/null 2>&1 || true
  done
  if [ -s "$run/keeper.pid" ]; then
    local keeper
    keeper=$(cat "$run/keeper.pid")
    kill "$keeper" 2>/dev/null || true
    for _ in $(seq 100); do
      kill -0 "$keeper" 2>/dev/null || break
      sleep 0.1
    done
  fi
  umount "$run/packs" 2>/dev/null || true
  rm -rf --one-file-system "$run"
}
trap finish EXIT

# missing MODEL...: what is not whole in the cache, in words; nothing when all is.
missing() {
  "$floe" status --json | python3 -c '
import json, sys
found = {}
for mount in json.load(sys.stdin)["mounts"]:
    residency = mount["residency"] or {}
    whole = mount["mode"] == "native" or residency.get("here_bytes", -1) == residency.get("content_bytes", 0)
    for at in mount["uses"]:
        found[at] = "" if whole else residency.get("problem") or residency.get("state") or "unknown"
for at in sys.argv[1:]:
    if found.get(at, "not mounted"):
        print(at, found.get(at, "not mounted"))
' "$@"
}

places=()
number=0
for model in "$@"; do
  place=$run/mnt.$((number += 1))
  "$floe" model mount "$model" "$place" >/dev/null
  places+=("$place")
  say "reading $model"
  # Through the kernel, as readers do: what arrives is verified.
  find "$place" -type f -print0 | xargs -0 -r cat >/dev/null
done
end=$((SECONDS + patience))
while left=$(missing "${places[@]}") && [ -n "$left" ]; do
  [ "$SECONDS" -lt "$end" ] || die "not whole in the cache: $left" "a disk that is too small loses what came first; floe status"
  sleep 1
done

trap - EXIT
finish
"$floe" fsck --cache >&2
rm -rf "$dir/tmp" "$dir/spool" "$dir/writer.lock"
printf '{"id": "%s", "models": "%s"}\n' "$(cat /proc/sys/kernel/random/uuid)" "$*" >"$dir/planted.json"
sync -f "$dir"
say "planted $# models, $(du -sh "$dir" | cut -f1)"
