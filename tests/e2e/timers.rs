//! Timers, clocks, and sleeps in progress.

use e2e::{Workload, rows, workload_rows};

workload_rows! { "timers.c";
    itimer_real
    itimer_virtual
    itimer_profile
    itimer_pending
    alarm_in_time
    posix_timers
    overrun
    missed
    other_notifications
    clocks
    timestamps
    in_nanosleep
    in_clock_nanosleep
    in_poll
    in_select
    in_futex
    in_read
}

rows! {
    in_epoll => |row| row.check_from_inside(&Workload::new("timers.c", "in_epoll"));
}

mod interop {
    e2e::interop_rows! { "timers.c"; posix_timers itimer_real alarm_in_time }
}
