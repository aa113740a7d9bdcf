//! Everything that `check` looks at, in the order in which it is shown: name, probe, what for, what follows where it is
//! absent, what to do about that.

use Without::{Less, Nothing, Same};

use super::{Probe, Without};
use crate::kernel::probe::privilege::{capability, checkpoint_restore, limit};
use crate::kernel::probe::uffd::{Features, grants};
use crate::kernel::probe::{cgroup, ebpf, files, memory, mount, network, privilege, process, socket, trace, uffd};

const ALL_RIGHTS: &str = "run as root, or give the capability (setpriv, capsh, a container's list of capabilities)";
const OWN_ONLY: Without = Less("programs of the engine's own user");
const NO_TCP: Without = Less("programs without TCP connections, or --tcp-close");
const BITS: Without = Less("soft-dirty bits where the kernel keeps them, else every dump writes every page");
const NO_FILTERS: Without = Less("programs without seccomp filters");

macro_rules! probes {
    ($($group:literal { $($name:literal $ask:expr, $purpose:literal, $without:expr, $advice:expr;)* })*) => {
        /// The table.
        pub static PROBES: &[Probe] = &[$($(Probe {
            name: $name,
            group: $group,
            purpose: $purpose,
            without: $without,
            advice: $advice,
            ask: $ask,
        },)*)*];
    };
}

probes! {
    "system" {
        "kernel" privilege::kernel, "what the engine was written for", Nothing, "use an x86_64 machine";
        "proc_children" process::children, "find the tree of a process", Nothing,
            "mount /proc; build the kernel with CONFIG_PROC_CHILDREN";
        "run_directory" files::kept, "keep what was found out about this boot", Same("it is looked up anew each time"),
            "make /run writable, and /run/criu-ebpf root's own with mode 0700";
    }
    "process" {
        "ptrace" trace::control, "stop processes, read and write registers", Nothing,
            "run as root; set kernel.yama.ptrace_scope below 3";
        "proc_mem_write" trace::forced_write, "put the agent into a stopped process", Nothing,
            "boot with proc_mem.force_override=ptrace, or build without CONFIG_PROC_MEM_NO_FORCE";
        "process_vm" memory::process_vm, "fill the memory of a process", Nothing, "build with CONFIG_CROSS_MEMORY_ATTACH";
        "pidfd" process::pidfd, "hold on to processes", Nothing, "use Linux 5.3 or later";
        "pidfd_getfd" process::pidfd_getfd, "take part in the open files of a process", Nothing,
            "use Linux 5.6 or later; a seccomp filter of a container may be in the way";
        "clone3_set_tid" process::clone3_set_tid, "give processes the pids that they had", Nothing,
            "use Linux 5.5 or later, with cap_checkpoint_restore";
        "prctl_mm_map" process::mm_map, "give processes the addresses that they had", Nothing,
            "build with CONFIG_CHECKPOINT_RESTORE";
        "kcmp" process::kcmp, "tell which open files are one", Nothing, "build with CONFIG_KCMP";
        "kcmp_epoll" process::kcmp_epoll, "tell what an epoll instance watches", Less("programs without epoll"),
            "build with CONFIG_KCMP; use Linux 4.13 or later";
        "rseq_configuration" trace::rseq_configuration, "registrations of restartable sequences", Nothing,
            "use Linux 5.13 or later with CONFIG_RSEQ";
        "suspend_seccomp" trace::suspend_seccomp, "run the agent where a filter forbids its calls", NO_FILTERS,
            "build with CONFIG_CHECKPOINT_RESTORE and CONFIG_SECCOMP_FILTER; run with cap_sys_admin";
        "seccomp_filter" trace::seccomp_filter, "read the filters of a process", NO_FILTERS,
            "build with CONFIG_CHECKPOINT_RESTORE and CONFIG_SECCOMP_FILTER; run with cap_sys_admin";
        "time_namespace" process::time_namespace, "let clocks go on from where they stood", Nothing,
            "build with CONFIG_TIME_NS; run with cap_sys_admin";
        "timer_ids" process::timer_ids, "give POSIX timers the ids that they had",
            Less("programs whose timer ids have few gaps"), "use Linux 6.15 or later";
        "membarrier_registrations" process::membarrier_registrations, "registrations for membarrier",
            Less("programs without membarrier"), "use Linux 6.3 or later";
    }
    "memory" {
        "pagemap_scan" memory::pagemap_scan, "find the pages that hold something",
            Same("/proc/PID/pagemap, which is read for every page there could be"), "use Linux 6.7 or later";
        "guard_regions" memory::guard_regions, "find guard regions", Less("programs without guard regions"),
            "use Linux 6.16 or later";
        "memfd" memory::memfd, "share memory with the agent", Nothing, "build with CONFIG_MEMFD_CREATE";
        "memfd_hugetlb" memory::memfd_hugetlb, "files of huge pages", Less("programs without files of huge pages"),
            "build with CONFIG_HUGETLBFS";
        "procmap_query" memory::procmap_query, "ask for one area of a process", Same("/proc/PID/smaps"),
            "use Linux 6.11 or later";
        "userfaultfd" uffd::userfaultfd, "track written pages", BITS,
            "build with CONFIG_USERFAULTFD; run with cap_sys_ptrace, or set vm.unprivileged_userfaultfd";
        "uffd_wp_async" uffd::tracks_writes, "track written pages without stopping the writer", BITS,
            "use Linux 6.7 or later with CONFIG_PTE_MARKER_UFFD_WP";
        "uffd_wp_unpopulated" grants::<{ Features::WP_UNPOPULATED.bits() }>, "track pages that do not exist yet",
            BITS, "use Linux 6.4 or later";
        "uffd_wp_hugetlbfs_shmem" grants::<{ Features::WP_HUGETLBFS_SHMEM.bits() }>, "track shared memory and huge pages",
            Less("shared memory and huge pages are written whole"), "use Linux 5.19 or later";
        "soft_dirty" memory::soft_dirty, "track written pages as CRIU does", Same("userfaultfd's WP_ASYNC"),
            "build with CONFIG_MEM_SOFT_DIRTY";
    }
    "eBPF" {
        "btf" ebpf::type_information, "know the kernel's structures", Less("/proc in place of eBPF"),
            "build with CONFIG_DEBUG_INFO_BTF";
        "iterators" ebpf::iterators, "look over large trees quickly", Less("/proc and kcmp (--survey proc)"),
            "build with CONFIG_BPF_SYSCALL and CONFIG_DEBUG_INFO_BTF; use Linux 6.1 or later, as root";
        "tp_btf" ebpf::tracepoint, "learn when pages are written and connections change",
            Less("what changed is known, but not when"), "build with CONFIG_BPF_EVENTS";
        "fentry" ebpf::function_entry, "watch kernel functions", Same("tracepoints"),
            "build with CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS";
        "ring_buffer" ebpf::ring_buffer, "get records from eBPF programs", Less("maps that are read at intervals"),
            "use Linux 5.8 or later";
        "tcx" ebpf::tcx, "hold the packets of connections", Same("clsact"),
            "use Linux 6.6 or later with CONFIG_NET_XGRESS";
        "clsact" ebpf::clsact, "hold the packets of connections on older kernels", Same("tcx, or else nftables"),
            "build with CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF; run with cap_net_admin";
        "bpffs" ebpf::file_system, "let programs outlive a command", NO_TCP, "build with CONFIG_BPF_SYSCALL; run as root";
    }
    "sockets" {
        "unix_diag" socket::unix_diag, "what unix sockets are connected to", Less("programs without unix sockets"),
            "build with CONFIG_UNIX_DIAG";
        "unix_socket_file" socket::unix_file, "the files of unix sockets", Less("programs without named unix sockets"),
            "use Linux 4.10 or later, with cap_net_admin";
        "inet_diag_tcp" network::inet_diag::<6>, "TCP sockets", NO_TCP, "build with CONFIG_INET_TCP_DIAG";
        "inet_diag_udp" network::inet_diag::<17>, "UDP sockets", Same("socket options"), "build with CONFIG_INET_UDP_DIAG";
        "inet_diag_raw" network::inet_diag::<255>, "raw sockets", Less("programs without raw sockets"),
            "build with CONFIG_INET_RAW_DIAG";
        "nftables" network::nftables, "hold the packets of connections where eBPF cannot (--network-lock nftables)",
            Same("tcx"), "build with CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET; run with cap_net_admin";
        "tcp_repair" socket::tcp_repair, "read and rebuild TCP connections", NO_TCP,
            "build with CONFIG_CHECKPOINT_RESTORE; run with cap_net_admin";
        "raw_sockets" socket::raw, "rebuild half-closed TCP connections", NO_TCP, "run with cap_net_raw and cap_net_admin";
        "tls" socket::tls, "connections that the kernel encrypts", Less("programs without such connections"),
            "use Linux 6.0 or later with CONFIG_TLS";
        "tcp_clients" ebpf::pending_clients, "clients of TCP servers that nobody has accepted", Less("--skip-in-flight"),
            "use Linux 6.9 or later with CONFIG_SYN_COOKIES; set net.ipv4.tcp_syncookies to 1";
        "connections_ahead" ebpf::connections_ahead, "ask many connections before the freeze",
            Less("longer freezes of many connections"), "use Linux 6.1 or later with CONFIG_DEBUG_INFO_BTF";
        "socket_buffer_lock" socket::buffer_lock, "whether buffer sizes were chosen", Less("chosen sizes may adapt again"),
            "use Linux 5.15 or later";
    }
    "files" {
        "new_mount_api" mount::detached, "names of sockets that are taken by now",
            Less("programs whose sockets' names are free"), "use Linux 5.2 or later, with cap_sys_admin";
        "timerfd_ticks" files::timer_ticks, "timerfds that have fired", Less("what they counted is lost"),
            "build with CONFIG_CHECKPOINT_RESTORE";
        "fdinfo_locks" files::locks, "file locks (--file-locks)", Less("programs without file locks"),
            "use Linux 4.1 or later";
    }
    "control groups" {
        "cgroup_freezer_v1" cgroup::freezer_v1, "--freeze-cgroup", Same("ptrace alone, or version 2"),
            "mount a hierarchy with the freezer controller";
        "cgroup_freezer_v2" cgroup::freezer_v2, "--freeze-cgroup", Same("ptrace alone, or version 1"),
            "mount cgroup2; use Linux 5.2 or later";
    }
    "privileges" {
        "cap_sys_ptrace" capability::<19>, "processes of other users", Nothing, ALL_RIGHTS;
        "cap_sys_admin" capability::<21>, "time namespaces, seccomp filters, files by their handles", Nothing, ALL_RIGHTS;
        "cap_checkpoint_restore" checkpoint_restore, "choose pids", Nothing, ALL_RIGHTS;
        "cap_setuid" capability::<7>, "give processes their users back", OWN_ONLY, ALL_RIGHTS;
        "cap_setgid" capability::<6>, "give processes their groups back", OWN_ONLY, ALL_RIGHTS;
        "cap_setpcap" capability::<8>, "give processes the bounds of their capabilities back", OWN_ONLY, ALL_RIGHTS;
        "cap_kill" capability::<5>, "end processes of other users", OWN_ONLY, ALL_RIGHTS;
        "cap_chown" capability::<0>, "give deleted files their owners back", OWN_ONLY, ALL_RIGHTS;
        "cap_dac_override" capability::<1>, "open files of other users", OWN_ONLY, ALL_RIGHTS;
        "cap_dac_read_search" capability::<2>, "open files by their handles", Less("programs without inotify"), ALL_RIGHTS;
        "cap_net_admin" capability::<12>, "repair mode, marks and files of sockets", NO_TCP, ALL_RIGHTS;
        "cap_net_raw" capability::<13>, "raw packets for half-closed connections", NO_TCP, ALL_RIGHTS;
        "cap_bpf" capability::<39>, "load eBPF programs", Same("cap_sys_admin, which includes it"), ALL_RIGHTS;
        "cap_perfmon" capability::<38>, "load eBPF programs that trace", Same("cap_sys_admin, which includes it"), ALL_RIGHTS;
        "cap_sys_nice" capability::<23>, "give processes their priorities back",
            Less("programs of usual priority"), ALL_RIGHTS;
        "cap_sys_resource" capability::<24>, "raise limits, lower oom_score_adj",
            Less("limits are kept or lowered; a restore that has to raise one is refused"), ALL_RIGHTS;
        "rlimit_nofile" limit::<{ libc::RLIMIT_NOFILE }, 4096>, "hold the open files of a whole tree",
            Less("smaller trees"), "raise the hard limit (ulimit -Hn, LimitNOFILE=)";
        "rlimit_nproc" limit::<{ libc::RLIMIT_NPROC }, 1024>, "make as many processes as there were",
            Less("smaller trees"), "raise the hard limit (ulimit -Hu, LimitNPROC=)";
    }
}
