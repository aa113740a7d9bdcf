//! Who is put into a followed control group, or taken out of it: by writing a pid into its `cgroup.procs`. What is forked
//! inside is followed like every child.

use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::BtfTracePointContext;
use criu_common::offsets::ABSENT;
use criu_common::watch::{BY_CGROUP, Group, Header, Loss, MOST_GROUPS, Moved, RecordKind};

use crate::access::{get, off};
use crate::tracked::{Wake, entry, insert, key_of, lookup, may_be_tracked, pid_of, remove, send};

/// The groups that are followed, with all below them.
#[map]
static GROUPS: HashMap<Group, u32> = HashMap::with_max_entries(MOST_GROUPS, 0);

/// How deep groups are looked for.
const DEPTH: u32 = 24;

/// Whether a group, or one above it, is followed.
///
/// # Safety
/// None of its own: the helper checks addresses.
#[inline(always)]
unsafe fn is_followed(group: u64) -> bool {
    // SAFETY: as said above.
    unsafe {
        let hierarchy: u32 = get(get(group, off!(cgroup_root)), off!(root_hierarchy));
        let id_of = |group: u64| get::<u64>(get(group, off!(cgroup_kn)), off!(kn_id));
        let has = |group: u64| GROUPS.get(Group { id: id_of(group), hierarchy, zero: 0 }).is_some();
        if off!(cgroup_ancestors) == ABSENT {
            return has(group);
        }
        let level: u32 = get(group, off!(cgroup_level));
        for above in 0..DEPTH {
            if above > level {
                break;
            }
            if has(get(group, off!(cgroup_ancestors) + above * 8)) {
                return true;
            }
        }
        false
    }
}

/// `cgroup_attach_task(group, path, leader, whole)`: after the move.
#[btf_tracepoint(function = "cgroup_attach_task")]
fn watch_attach(ctx: BtfTracePointContext) -> i32 {
    let group: u64 = ctx.arg(0);
    let task: *const c_void = ctx.arg(2);
    // SAFETY: a typed pointer, and an address that helpers check.
    unsafe {
        let key = key_of(task);
        let is_in = is_followed(group);
        let was_in = may_be_tracked(key) && lookup(key).is_some();
        if is_in == was_in {
            return 0;
        }
        let pid = pid_of(task);
        if is_in {
            let mut process = entry(task, pid);
            process.flags |= BY_CGROUP;
            insert(key, &process);
        } else {
            let hierarchy: u32 = get(get(group, off!(cgroup_root)), off!(root_hierarchy));
            // Followed for another reason, or moved within another hierarchy.
            let is_ours = lookup(key).is_some_and(|process| process.flags & BY_CGROUP != 0);
            if !is_ours || GROUPS.get(Group { id: 0, hierarchy, zero: 0 }).is_none() {
                return 0;
            }
            remove(key);
        }
        let header = Header { kind: RecordKind::Moved as u32, key, pid, tid: pid, time_ns: bpf_ktime_get_ns() };
        send(Moved { header, is_in: u32::from(is_in), zero: 0 }, Loss::Lifecycle, Wake::Now);
    }
    0
}
