//! eventfd, epoll, signalfd, timerfd and inotify.

use e2e::workload_rows;

workload_rows! { "events.py";
    event_counter
    event_flags
    event_shared
    epoll_registrations
    epoll_edge
    epoll_nested
    epoll_duplicate
    epoll_many
    epoll_child
    signals
    timers
    timer_expired
    timer_absolute
    inotify_watches
    inotify_pending
    polled
}
