//! `check --feature NAME`: the questions that CRIU answers, under its names.
//!
//! Mostly they are about an interface of the kernel, and are answered by trying that. A few are about the engine itself;
//! those are answered for this engine, not for CRIU.

use crate::kernel::probe::uffd::{Features, grants};
use crate::kernel::probe::{Absent, Answer, files, memory, mount, network, process, socket, trace, uffd};

/// A question of CRIU's.
#[derive(Debug, Clone, Copy)]
pub struct Feature {
    /// Its name for `--feature`.
    pub name: &'static str,
    /// Tries it.
    pub ask: fn() -> Answer,
    /// What this engine does not do with it although the kernel may have it: said beside a yes.
    pub unused: Option<&'static str>,
}

const fn used(name: &'static str, ask: fn() -> Answer) -> Feature {
    Feature { name, ask, unused: None }
}

const fn unused(name: &'static str, ask: fn() -> Answer, why: &'static str) -> Feature {
    Feature { name, ask, unused: Some(why) }
}

const NAMESPACES: &str = "trees in namespaces of their own are refused";
const TUN: &str = "open TUN devices are refused";
const NO_IPTABLES: &str = "this engine holds connections by eBPF, or by nf_tables";

/// The features that can be asked for.
pub static FEATURES: &[Feature] = &[
    used("mnt_id", files::mount_id),
    used("mem_dirty_track", dirty_track),
    unused("aio_remap", memory::aio_ring_moves, "asynchronous I/O is refused"),
    used("timerfd", files::timer_ticks),
    unused("tun", network::tun_device, TUN),
    unused("tun_ns", network::tun_namespace, TUN),
    unused("userns", process::user_namespace, NAMESPACES),
    used("fdinfo_lock", files::locks),
    used("seccomp_suspend", trace::suspend_seccomp),
    used("seccomp_filters", trace::seccomp_filter),
    unused("loginuid", process::login_uid, "login uids are not restored"),
    unused("cgroupns", process::cgroup_namespace, NAMESPACES),
    unused("autofs", mount::autofs, NAMESPACES),
    used("tcp_half_closed", socket::tcp_half_closed),
    used("compat_cr", compat),
    unused("uffd", uffd::userfaultfd, "pages do not come on demand at a restore"),
    unused("uffd-noncoop", non_cooperative, "pages do not come on demand at a restore"),
    used("can_map_vdso", process::vdso_64),
    used("sk_ns", socket::namespace),
    used("sk_unix_file", socket::unix_file),
    used("net_diag_raw", network::inet_diag::<255>),
    unused("nsid", network::numbers, NAMESPACES),
    unused("link_nsid", network::links_by_number, NAMESPACES),
    used("kcmp_epoll", process::kcmp_epoll),
    used("timens", process::time_namespace),
    used("external_net_ns", external_network),
    used("clone3_set_tid", process::clone3_set_tid),
    unused("newifindex", network::new_link_index, NAMESPACES),
    used("nftables", network::nftables),
    unused("has_ipt_legacy", network::iptables_legacy, NO_IPTABLES),
    used("pidfd_store", pidfd_store),
    used("ns_pid", process::ns_pid),
    unused("apparmor_stacking", apparmor_stacking, "AppArmor profiles are not restored"),
    used("network_lock_nftables", network::nftables),
    used("sockopt_buf_lock", socket::buffer_lock),
    used("memfd_hugetlb", memory::memfd_hugetlb),
    unused("move_mount_set_group", mount::set_group, NAMESPACES),
    used("openat2", files::openat2_resolves),
    used("get_rseq_conf", trace::rseq_configuration),
    used("ipv6_freebind", socket::ipv6_freebind),
    used("pagemap_scan", memory::pagemap_scan),
    used("timer_cr_ids", process::timer_ids),
    used("overlayfs_maps", mount::overlay_maps),
    used("breakpoints", trace::breakpoints),
    used("pagemap_scan_guard_pages", memory::guard_regions),
];

/// There is no such feature.
#[derive(Debug, thiserror::Error)]
#[error("Unknown feature {name}; known are {}", FEATURES.iter().map(|f| f.name).collect::<Vec<_>>().join(" "))]
pub struct UnknownFeature {
    /// What was asked for.
    pub name: String,
}

/// Finds a feature by its name.
pub fn find(name: &str) -> Result<&'static Feature, UnknownFeature> {
    FEATURES.iter().find(|feature| feature.name == name).ok_or_else(|| UnknownFeature { name: name.to_owned() })
}

/// Whether it is told which pages were written, by a userfaultfd or by soft-dirty bits.
fn dirty_track() -> Answer {
    uffd::tracks_writes().or_else(|absent| memory::soft_dirty().map_err(|_| absent))
}

/// 32-bit programs.
fn compat() -> Answer {
    process::vdso_32()?;
    Err(Absent::because("the kernel could, but this engine refuses 32-bit programs"))
}

/// Network namespaces that are given at the restore.
fn external_network() -> Answer {
    Err(Absent::because("this engine refuses trees in a network namespace of their own"))
}

/// What it takes to serve pages to a program that does not know of it.
fn non_cooperative() -> Answer {
    const EVENTS: Features =
        Features::EVENT_FORK.union(Features::EVENT_REMAP).union(Features::EVENT_REMOVE).union(Features::EVENT_UNMAP);
    grants::<{ EVENTS.bits() }>()
}

fn pidfd_store() -> Answer {
    process::pidfd()?;
    process::pidfd_getfd()
}

fn apparmor_stacking() -> Answer {
    let path = "/sys/kernel/security/apparmor/features/domain/stack";
    match std::fs::read_to_string(path) {
        Ok(text) if text.trim() == "yes" => Ok(String::new()),
        Ok(text) => Err(Absent::because(format!("{path} says {}", text.trim()))),
        Err(error) => Err(Absent::because(format!("{path}: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        let mut names: Vec<&str> = FEATURES.iter().map(|feature| feature.name).collect();
        assert!(names.iter().all(|name| find(name).is_ok_and(|found| found.name == *name)));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FEATURES.len());
        assert!(find("no_such").is_err_and(|error| error.to_string().contains("no_such")));
    }
}
