//! Memory: contents, sharing, protection, and what madvise and mlock said.

use e2e::{Options, Workload, rows, workload_rows};

use crate::live::Group;

/// A directory on a tmpfs: whoever writes there pays with memory.
pub(crate) fn on_tmpfs() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("e2e-").tempdir_in("/dev/shm").expect("a directory on a tmpfs")
}

workload_rows! { "memory.py";
    private_anonymous
    scattered_pages
    zeroed_pages
    file_private
    file_private_read_only
    shared_anonymous
    shared_anonymous_apart
    shared_file
    shared_file_read_only
    memfd
    memfd_sealed
    memfd_private
    deleted_backing_private
    deleted_backing_shared
    protection_none
    executable
    many_mappings
    many_protections
    large_protections
    advice_dontfork
    advice_dontdump
    advice_hugepage
    advice_nohugepage
    advice_mergeable
    advice_wipeonfork
    advice_sequential
    advice_random
    wiped_on_fork
    guard_regions
    locked
    copy_on_write
    copy_on_write_apart
    huge_pages
    sysv_shared
    dev_zero_shared
    tmpfs_file
    address_space_facts
    flags_of_the_process
    vdso
}

workload_rows! { "stack.c";
    program_break
    deep_stack
    stack_grows
    grows_down
}

rows! {
    /// What it wrote itself would count for its group, which has no room for that: on a tmpfs it never becomes less.
    in_a_full_group => |row| {
        let mut program = Workload::new("live.c", "large").start();
        let group = Group::new("memory", &program, "memory.limit_in_bytes", |_| (64 << 20).to_string());
        let images = on_tmpfs();
        let row = row.with(Options::both(&["--manage-cgroups=ignore", "--file-locks"]));
        let tree = program.tree();
        row.dumper.dump(&program, images.path(), &row.options).expect_success();
        program.expect_gone(&tree);
        drop(group);
        row.restore(&program, images.path());
        program.finish();
    };

    /// Nobody can read it, not even the kernel for us.
    secret => |row| row.refused(&Workload::new("memory.py", "secret"), "memfd_secret");
}
