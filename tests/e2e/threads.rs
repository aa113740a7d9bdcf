//! Threads, and what the kernel keeps for each of them.

use e2e::{Workload, rows, workload_rows};

workload_rows! { "threads.c";
    many
    names
    robust_list
    futex_waiters
    mutex_held
    alternate_stacks
    masks
    schedules
    busy
    dead_leader
    child_of_a_thread
}

rows! {
    coming_and_going => |row| row.check_from_inside(&Workload::new("threads.c", "coming_and_going"));
}

mod interop {
    e2e::interop_rows! { "threads.c"; many futex_waiters alternate_stacks }
}
