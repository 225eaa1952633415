#!/usr/bin/env bash
# A Debian 12 that boots, for tests/boot: make-image.sh FOLDER. `install/setup.sh boot` calls it.
#
#     FOLDER/base.tar.zst      the system as debootstrap and apt make it; made again when this script changes
#     FOLDER/root.img          the same as an ext4 file system; machines write to a copy of their own
#     FOLDER/vmlinuz, initrd   its kernel, which qemu loads
set -euo pipefail

folder=$1
suite=bookworm
here=$(cd "$(dirname "$0")" && pwd)
wanted=$(sha256sum <"$here/make-image.sh")
[ "$(cat "$folder/stamp" 2>/dev/null)" != "$wanted" ] || exit 0
mkdir -p "$folder"
work=$(mktemp -d "$folder/work.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
unset TMPDIR # a folder of this machine, which the programs in the new root do not find
root=$work/root

# Debian's own mirror, as this machine knows it.
# shellcheck disable=SC2016
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' 2>/dev/null |
  { grep /debian/ || true; } | head -n 1)
debootstrap --variant=minbase "$suite" "$root" "${mirror:-http://deb.debian.org/debian/}"

# What the initial RAM disk must have to find the root disk; `most` would take qemu's emulation seconds more at each boot.
mkdir -p "$root/etc/initramfs-tools/conf.d" "$root/usr/share/initramfs-tools/modules.d"
echo MODULES=list >"$root/etc/initramfs-tools/conf.d/floe"
printf '%s\n' virtio_pci virtio_blk ext4 >"$root/usr/share/initramfs-tools/modules.d/floe"
packages=(
  linux-image-amd64 initramfs-tools zstd systemd systemd-sysv dbus udev kmod # what boots
  containerd runc python3 python3-venv ca-certificates                        # what a node has
  e2fsprogs fdisk mdadm procps iproute2 psmisc strace                         # what the tests look with
  qemu-guest-agent                                                            # what they speak to
)
# shellcheck disable=SC2016
unshare --mount --propagation private sh -eu -c '
  mount -t proc proc "$1/proc"
  root=$1; shift
  export DEBIAN_FRONTEND=noninteractive
  chroot "$root" apt-get -q update
  chroot "$root" apt-get -q -y --no-install-recommends -o Dpkg::Options::=--force-confold install "$@"
  chroot "$root" apt-get clean
' sh "$root" "${packages[@]}"

# The machine: its disk, a network by DHCP, the tests' disk, and localhost:5000, which is the tests' registry.
echo floe-node >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 floe-node\n' >"$root/etc/hosts"
cat >"$root/etc/fstab" <<'FSTAB'
/dev/vda / ext4 defaults 0 1
LABEL=floe-tests /srv ext4 ro,nofail,x-systemd.device-timeout=10min 0 2
FSTAB
cat >"$root/etc/systemd/network/all.network" <<'NETWORK'
[Match]
Name=en*
[Network]
DHCP=ipv4
NETWORK
cat >"$root/etc/systemd/system/registry.socket" <<'SOCKET'
[Socket]
ListenStream=127.0.0.1:5000
[Install]
WantedBy=sockets.target
SOCKET
# The tests write REGISTRY=10.0.2.2:PORT, the machine that runs qemu as its guest sees it.
cat >"$root/etc/systemd/system/registry.service" <<'SERVICE'
[Service]
EnvironmentFile=/etc/registry
ExecStart=/usr/lib/systemd/systemd-socket-proxyd $REGISTRY
SERVICE
# What a kubelet says comes from the machine that runs qemu.
printf '[Socket]\nListenStream=5001\n[Install]\nWantedBy=sockets.target\n' >"$root/etc/systemd/system/cri.socket"
printf '[Service]\nExecStart=/usr/lib/systemd/systemd-socket-proxyd /run/containerd/containerd.sock\n' >"$root/etc/systemd/system/cri.service"
chroot "$root" systemctl enable systemd-networkd registry.socket cri.socket serial-getty@ttyS0 >/dev/null
chroot "$root" systemctl mask apt-daily.timer apt-daily-upgrade.timer man-db.timer fstrim.timer e2scrub_all.timer >/dev/null
chroot "$root" passwd -d root >/dev/null
echo nameserver 10.0.2.3 >"$root/etc/resolv.conf" # qemu's
: >"$root/etc/machine-id"

cp "$root"/boot/vmlinuz-* "$work/vmlinuz"
cp "$root"/boot/initrd.img-* "$work/initrd"
rm -rf "${root:?}"/boot/* "$root"/usr/share/{doc,man,locale} "$root"/var/cache/apt "$root"/var/lib/apt/lists
drivers=$(echo "$root"/lib/modules/*/kernel/drivers)
rm -rf "${drivers:?}"/{gpu,media,infiniband,iio,staging,net/ethernet,net/wireless,usb,hid,isdn} "${drivers%/drivers}/sound"
mkdir -p "$root"/var/lib/apt/lists/partial "$root"/var/cache/apt/archives/partial

tar --numeric-owner --xattrs -C "$root" -cf - . | zstd -q -3 >"$work/base.tar.zst"
truncate -s 6G "$work/root.img"
mke2fs -q -t ext4 -d "$root" -L floe-root "$work/root.img"
mv "$work"/{base.tar.zst,root.img,vmlinuz,initrd} "$folder"
echo "$wanted" >"$folder/stamp"
