#!/usr/bin/env bash
# Copies a planted cache (plant-cache.sh) into this node's: copy-cache.sh [FROM [TO...]]
#
# FROM: the planted directory, else the disk labelled floe-planted. TO: the directories of the node cache, else those of
# Floe's settings. Only while no pack filesystem runs: a cache has one writer. Every frame is hashed before it is believed;
# what is damaged is left out, and comes from the store when it is read. Run again, it does nothing; interrupted, it begins anew.
set -euo pipefail

label='floe-planted'
floe=${FLOE:-/usr/local/bin/floe}
say() { printf 'copy-cache: %s\n' "$*" >&2; }
die() { printf 'copy-cache: error: %s\ncopy-cache: hint: %s\n' "$1" "$2" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "this needs root" "run it again with sudo"
from=${1:-}
[ $# = 0 ] || shift
work=$(mktemp -d)
mounted=
finish() {
  [ -z "$mounted" ] || umount "$work/planted" || true
  rm -rf --one-file-system "$work"
}
trap finish EXIT

if [ -z "$from" ]; then
  device=/dev/disk/by-label/$label
  if [ ! -e "$device" ]; then
    say "there is no disk labelled $label"
    exit 0
  fi
  # Where the platform has mounted it already, there.
  from=$(findmnt --noheadings --first-only --output TARGET --source "$(readlink -f "$device")" || true)
  if [ -z "$from" ]; then
    mkdir "$work/planted"
    mount -o ro,noload,nodev,nosuid,noexec "$device" "$work/planted"
    mounted=yes
    from=$work/planted
  fi
fi
[ -f "$from/planted.json" ] || die "$from has no planted.json" "plant-cache.sh fills such a disk, and ends with that file"

targets=("$@")
if [ ${#targets[@]} = 0 ]; then
  listed=$("$floe" status --index none --json |
    python3 -c 'import json, sys; print("\n".join(d["path"] for d in json.load(sys.stdin)["cache"]["directories"]))')
  mapfile -t targets <<<"$listed"
fi
if cmp -s "$from/planted.json" "${targets[0]}/planted.json"; then
  say "was copied before"
  exit 0
fi
umask 077
for target in "${targets[@]}"; do
  mkdir -p "$target/packs" "$target/trees"
  # The lock of the cache's writer, held to the end: a pack filesystem that is started meanwhile waits or is refused.
  exec {lock}<>"$target/writer.lock"
  flock --nonblock "$lock" || die "a pack filesystem writes to $target" "copy before it starts: floe-planted.service does"
  rm -rf "$target/planted.new"
done

# roomiest BYTES: the directory with most room, if it has a fifth of its disk left after that.
roomiest() {
  local target best='' most=0 size avail
  for target in "${targets[@]}"; do
    read -r size avail < <(df --block-size=1 --output=size,avail "$target" | tail -n 1)
    if [ $((avail - $1)) -gt $((size / 5)) ] && [ "$avail" -gt "$most" ]; then
      best=$target most=$avail
    fi
  done
  printf '%s' "$best"
}

copied=0 left_out=0
for pack in "$from"/packs/*; do
  name=${pack##*/}
  [[ $name =~ ^[0-9a-f]{64}$ ]] || continue
  for target in "${targets[@]}"; do
    if [ -e "$target/packs/$name" ]; then continue 2; fi
  done
  target=$(roomiest "$(du -s --block-size=1 "$pack" | cut -f1)")
  if [ -z "$target" ]; then
    left_out=$((left_out + 1))
    continue
  fi
  place=$target/planted.new/packs/$name
  mkdir -p "$place/pins"
  for part in index bitmap data complete; do
    [ ! -e "$pack/$part" ] || cp --sparse=always "$pack/$part" "$place/$part"
  done
  copied=$((copied + 1))
done

for target in "${targets[@]}"; do
  [ -d "$target/planted.new" ] || continue
  # 3: something was damaged, and dropped.
  code=0
  "$floe" fsck --config '' --cache --repair --cache-dir "$target/planted.new" --cache-dirs none >&2 || code=$?
  [ "$code" = 0 ] || [ "$code" = 3 ] || die "what was copied to $target cannot be checked" "it is left out; the node fetches from the store"
  # `complete` says that the data is on the disk: only then do others see it.
  sync -f "$target"
  for pack in "$target"/planted.new/packs/*; do mv -nT "$pack" "$target/packs/${pack##*/}"; done
done
for tree in "$from"/trees/*.erofs; do
  # Not what says that it was checked: it is checked here.
  if [ -e "$tree" ] && [ ! -e "${targets[0]}/trees/${tree##*/}" ]; then
    cp "$tree" "${targets[0]}/planted.tree"
    mv "${targets[0]}/planted.tree" "${targets[0]}/trees/${tree##*/}"
  fi
done
for target in "${targets[@]}"; do rm -rf "$target/planted.new"; done
cp "$from/planted.json" "${targets[0]}/planted.json"
sync -f "${targets[0]}"
say "copied $copied packs; $left_out are left out for want of room"
