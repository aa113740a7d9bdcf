//! Timers, clocks, and sleeps in progress.

use e2e::{Options, Row, Workload, rows, workload_rows};

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
    in_hidden_futex
    in_read
}

rows! {
    in_epoll => |row| row.check_from_inside(&Workload::new("timers.c", "in_epoll"));
}

/// Two dumps within one wait: in the second, the program is in restart_syscall(2), and only the survey by eBPF sees what
/// that goes on with.
mod dumped_before {
    use super::*;

    fn check(row: &Row, case: &str) {
        let mut program = Workload::new("timers.c", case).start();
        let running = row.with(Options { dump: vec!["--leave-running".into()], ..Options::default() });
        running.dumper.dump(&program, &program.file("first"), &running.options).expect_success();
        row.cycle(&program);
        program.finish();
    }

    rows! {
        nanosleep => |row| check(row, "in_nanosleep");
        clock_nanosleep => |row| check(row, "in_clock_nanosleep");
        poll => |row| check(row, "in_poll");
        futex => |row| check(row, "in_futex");
        hidden_futex => |row| check(row, "in_hidden_futex");
    }
}

mod interop {
    e2e::interop_rows! { "timers.c"; posix_timers itimer_real alarm_in_time }
}
