//! Signals: actions, masks, and what is pending.

use e2e::{Workload, proc, rows, workload_rows};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

workload_rows! { "signals.c";
    actions
    blocked
    inside_a_handler
    pending
    queued_in_order
    thread_directed
    pending_child_death
    delivered_afterwards
    waiting_for_a_signal
    faults
}

rows! {
    /// A program that was stopped by SIGSTOP comes back stopped, and goes on at SIGCONT.
    stopped => |row| {
        let mut program = Workload::new("counter.py", "counter").start();
        let pid = Pid::from_raw(program.pid());
        kill(pid, Signal::SIGSTOP).expect("SIGSTOP");
        let state = || proc::stat(pid.as_raw()).map(|(state, _)| state);
        while state() != Some('T') {
            std::thread::sleep(e2e::reaper::POLL);
        }
        row.cycle(&program);
        assert_eq!(state(), Some('T'), "it was stopped before");
        kill(pid, Signal::SIGCONT).expect("SIGCONT");
        program.finish();
    };
}
