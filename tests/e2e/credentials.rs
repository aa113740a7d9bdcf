//! Credentials, limits and scheduling.

use e2e::workload_rows;

workload_rows! { "credentials.py";
    other_ids
    ordinary_user
    capabilities
    secure_bits
    keep_capabilities
    no_new_privileges
    limits
    niceness
    scheduled_fifo
    scheduled_round_robin
    scheduled_batch
    scheduled_idle
    scheduled_reset_on_fork
    affinity
    io_priority
    oom_score
    timer_slack
    parent_death_signal
    memory_barriers
    personality
    name
}
