#!/bin/bash
# What the virtual machine is started for: makes it a machine like the one outside, and runs the tests in it.
here=$(dirname "$0")
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /dev/pts /dev/shm
mount -t devpts none /dev/pts
mount -t tmpfs none /dev/shm
mount -t tmpfs none /run
# A file system on a disk, which takes O_DIRECT.
mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt
export TMPDIR=/mnt
mount -t cgroup2 none /sys/fs/cgroup
mkdir -p "/lib/modules/$(uname -r)"
mount --bind "$here/root/lib/modules/$(uname -r)" "/lib/modules/$(uname -r)"
modprobe -a fuse tun
# With huge pages for everybody, programs have more memory than their tests expect.
echo madvise > /sys/kernel/mm/transparent_hugepage/enabled
ip link set lo up
ulimit -n 1048576
hostname virtual
echo "Linux $(uname -r)"
bash "$here/job.sh" 2>&1
echo "ended with status $?"
sync
echo o > /proc/sysrq-trigger
sleep 60
