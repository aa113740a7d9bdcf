#!/busybox sh
# The first program in the virtual machine: brings the files of the machine outside in, under a file system in memory, and
# goes on there with what the command line names.
set -e
box=/busybox
$box mount -t proc none /proc
$box mount -t sysfs none /sys
$box mount -t devtmpfs none /dev
for module in $($box ls /modules); do
    $box insmod "/modules/$module"
done
$box mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose files /below
$box mount -t tmpfs none /above
$box mkdir /above/files /above/work
$box mount -t overlay -o lowerdir=/below,upperdir=/above/files,workdir=/above/work none /root
for place in proc sys dev; do
    $box mount --move "/$place" "/root/$place"
done
# Words of the command line that the kernel does not know, and that look so, are our environment.
exec $box switch_root /root /bin/bash "$KERNEL_DIR/start.sh"
