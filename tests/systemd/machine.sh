#!/bin/bash
# A throw-away machine for tests: namespaces of its own, and a root in which nothing is on a disk.
#
#   machine.sh DIR COMMAND...     runs COMMAND as process 1 in it; DIR is an empty directory to mount on, and the
#                                 machine finds what is in DIR.files under /srv/mhtraind-test
#
# The root is an overlay over this machine's own, whose upper layer is in memory: what is written there is gone at the
# end. systemd empties /tmp and writes all over the file system when it boots, so before COMMAND starts the old root is
# detached, and it does not start at all unless every mount that is left is known to have no disk behind it.
set -euo pipefail

fail() { echo "machine.sh: $*" >&2; exit 1; }

outside() {
    local v2
    v2=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/self/mounts)
    [ -n "$v2" ] || fail "no cgroup v2 is mounted here"
    # The root of the machine's own view of cgroups. Whoever started us removes it.
    mkdir -p "$v2/$(basename "$DIR")"
    echo $$ >"$v2/$(basename "$DIR")/cgroup.procs"
    # Should whoever started us die, the machine dies too.
    exec setpriv --pdeathsig KILL unshare --mount --propagation private --pid --fork --kill-child --uts --ipc --net --cgroup \
        "$0" --inside "$DIR" "$@"
}

make_root() {
    # unshare made this namespace private already. To be sure, before the first mount:
    mount --make-rprivate /
    mount -t tmpfs -o mode=755 tmpfs "$DIR"
    mkdir "$DIR"/{upper,work,root}
    mount -t overlay overlay -o "lowerdir=/,upperdir=$DIR/upper,workdir=$DIR/work" "$ROOT"

    mount -t tmpfs -o mode=1777 tmpfs "$ROOT/tmp"
    mount -t tmpfs -o mode=755 tmpfs "$ROOT/run"
    # systemd prepares credentials in a mount namespace and moves them here, which it alone would see otherwise.
    mount --make-shared "$ROOT/run"
    mkdir -p "$ROOT/run/lock" "$ROOT/run/systemd/system"
    mount -t tmpfs -o mode=755 tmpfs "$ROOT/var/log"
    mount -t tmpfs -o mode=755 tmpfs "$ROOT/etc/systemd/system"

    mount -t proc proc "$ROOT/proc"
    mount --bind "$ROOT/proc/sys" "$ROOT/proc/sys"
    mount -o remount,bind,ro "$ROOT/proc/sys"
    mount -t sysfs -o ro sysfs "$ROOT/sys"
    mount -t cgroup2 cgroup2 "$ROOT/sys/fs/cgroup"
    make_devices

    # What belongs to a kernel and a disk of one's own, of which there are none here.
    local unit
    for unit in systemd-{tmpfiles-setup,tmpfiles-setup-dev,sysctl,udevd,udev-trigger,modules-load,remount-fs}.service \
        systemd-{random-seed,update-utmp,sysusers}.service systemd-tmpfiles-clean.timer \
        dev-{hugepages,mqueue}.mount sys-kernel-{debug,tracing,config}.mount; do
        ln -s /dev/null "$ROOT/etc/systemd/system/$unit"
    done
    # Container images forbid packages to start services with it.
    rm -f "$ROOT/usr/sbin/policy-rc.d"

    mkdir -p "$ROOT/srv/mhtraind-test"
    cp -a "$DIR.files/." "$ROOT/srv/mhtraind-test/"
}

make_devices() {
    mount -t tmpfs -o mode=755 tmpfs "$ROOT/dev"
    mkdir "$ROOT"/dev/{pts,shm}
    chmod 1777 "$ROOT/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$ROOT/dev/pts"
    local name major minor
    while read -r name major minor; do
        mknod -m 666 "$ROOT/dev/$name" c "$major" "$minor"
    done <<<$'null 1 3\nzero 1 5\nfull 1 7\nrandom 1 8\nurandom 1 9\ntty 5 0'
    ln -s pts/ptmx "$ROOT/dev/ptmx"
    ln -s /proc/self/fd "$ROOT/dev/fd"
    ln -s null "$ROOT/dev/console"
    if [ -e "$ROOT/proc/sysrq-trigger" ]; then
        mount --bind "$ROOT/dev/null" "$ROOT/proc/sysrq-trigger"
    fi
}

leave_the_old_root() {
    mkdir -p "$ROOT/old"
    cd "$ROOT"
    pivot_root . old
    umount --lazy /old
    rmdir /old
}

check_mounts() {
    local unknown shared
    unknown=$(findmnt --raw --noheadings --output TARGET,FSTYPE,SOURCE |
        awk '$2 !~ /^(overlay|tmpfs|proc|sysfs|devpts|cgroup2)$/')
    [ -z "$unknown" ] || fail "mounts that may have a disk behind them are left, so nothing is started: $unknown"
    shared=$(findmnt --raw --noheadings --output TARGET,PROPAGATION | awk '$2 ~ /shared/ && $1 != "/run"')
    [ -z "$shared" ] || fail "more than /run is shared, so nothing is started: $shared"
}

if [ "$1" != --inside ]; then
    DIR=$(realpath "$1")
    shift
    outside "$@"
fi
DIR=$2
ROOT=$DIR/root
shift 2
make_root
leave_the_old_root
check_mounts
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
