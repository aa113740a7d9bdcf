//! `iter/task`: puts the process that the engine asks about into the tracked set, or tells of one that is in it.
//!
//! It is run for one process at a time (`bpf_iter_link_info.task`), so the kernel itself looks the pid up in the
//! engine's namespace, and no number is ever translated by hand.

use aya_ebpf::helpers::generated::bpf_seq_write;
use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;
use criu_common::offsets::ABSENT;
use criu_common::watch::{BY_CGROUP, Followed, Order, SHARED_DESCRIPTORS};

use crate::access::{get, off};
use crate::contexts::TaskContext;
use crate::ids::{id_at, reader_level};
use crate::tracked::{entry, find, insert, key_of, remove, set_level};

/// What to do, set by the engine before it runs the iterator; see `watch::Order` there.
#[map]
static ORDER: Array<u32> = Array::with_max_entries(1, 0);
const FOLLOW: u32 = Order::Follow as u32;
const FOLLOW_BY_CGROUP: u32 = Order::FollowByCgroup as u32;
const FORGET: u32 = Order::Forget as u32;

/// Writes a [`Followed`] for each thread of the process.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
extern "C" fn watch_follow(ctx: *const TaskContext) -> i32 {
    // SAFETY: the verifier admits only loads from the context and from typed kernel pointers.
    unsafe {
        let task = (*ctx).task;
        if task.is_null() {
            return 0;
        }
        let order = ORDER.get(0).copied().unwrap_or(0);
        let level = reader_level();
        set_level(level);
        let key = key_of(task);
        let leader: u64 = get(task as u64, off!(task_group_leader));
        let pid = id_at(get(leader, off!(task_thread_pid)), level);
        if order == FOLLOW || order == FOLLOW_BY_CGROUP {
            let mut process = entry(task, pid);
            if order == FOLLOW_BY_CGROUP {
                process.flags |= BY_CGROUP;
            }
            // More users than threads: also somebody who reads its directory in /proc just now, on older kernels. Then its
            // generation of descriptors is not believed for nothing.
            let users: u32 = get(get(task as u64, off!(task_files)), off!(files_count));
            let threads: u32 = get(get(task as u64, off!(task_signal)), off!(signal_threads));
            if users > threads {
                process.flags |= SHARED_DESCRIPTORS;
            }
            insert(key, &process);
            // It may have ended since it was looked up. Then it either finds itself in the set, or is seen to be dead here.
            if get::<u32>(get(task as u64, off!(task_signal)), off!(signal_live)) == 0 {
                remove(key);
            }
        } else if order == FORGET {
            remove(key);
        }
        let mut map_sequence = 0;
        if off!(mm_lock_seq) != ABSENT {
            map_sequence = get(get(task as u64, off!(task_mm)), off!(mm_lock_seq));
        }
        let answer = Followed { key, pid, map_sequence, is_in: u32::from(find(key).is_some()) };
        bpf_seq_write((*(*ctx).meta).seq.cast(), (&raw const answer).cast_mut().cast(), size_of::<Followed>() as u32);
    }
    0
}
