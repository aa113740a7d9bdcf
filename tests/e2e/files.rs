//! Regular files, directories, devices, and the descriptors on them.

use std::{fs, io::Write};

use e2e::{Workload, engine::Options, reaper, rows, workload_rows};

workload_rows! { "files.py";
    positions_and_flags
    far_positions
    high_numbers
    unlinked
    unlinked_of_two
    temporary
    unlinked_directory
    other_name
    replaced
    directory
    path_only
    path_only_link
    surroundings
    other_root
    devices
    proc_files
    duplicates
    shared_across_fork
    close_on_exec
    owner
    owner_of_pipe
    proc_files_shared
    unlinked_link
    unlinked_below
    unlinked_surroundings
}

workload_rows! { "files.py", ["--link-remap"]; hard_link }

workload_rows! { "files.py", ["--file-locks"];
    posix_locks
    flock_locks
    ofd_locks
    lease
}

rows! {
    /// A lock is not carried over unless it is asked for: it might be another program's business as well.
    locks_unasked => |row| row.refused(&Workload::new("files.py", "flock_locks"), "lock");

    /// A file that has another size than in the dump may not be the same file: refused, nothing is left over, and the
    /// images are good once the file is back.
    size_changed => |row| {
        let mut program = Workload::new("files.py", "waits").start();
        let tree = program.tree();
        let images = row.dump(&program);
        fs::rename(program.file("data"), program.file("aside")).expect("putting the file aside");
        fs::write(program.file("data"), "other content").expect("making another");
        row.restorer.restore(&images, &row.options).expect_refusal("size");
        let left = reaper::wait_gone(&tree, std::time::Duration::from_secs(5));
        assert!(left.is_empty(), "left over from a restore that failed: {left:?}");
        fs::rename(program.file("aside"), program.file("data")).expect("putting the file back");
        row.restore(&program, &images);
        program.finish();
    };

    /// As large as it was, but written to since: refused as well, unless nobody minds.
    content_changed => |row| {
        let mut program = Workload::new("files.py", "waits").start();
        let images = row.dump(&program);
        fs::write(program.file("data"), "content").expect("changing the file");
        row.restorer.restore(&images, &row.options).expect_refusal("written to");
        let options = Options { restore: vec!["--skip-file-validation".into()], ..Options::default() };
        row.with(options).restore(&program, &images);
        program.finish();
    };

    /// A file whose name is gone, but which has another one, cannot be found again without a further name.
    hard_link_unasked => |row| row.refused(&Workload::new("files.py", "hard_link"), "--link-remap");

    /// A dump that fails takes back the names that it gave.
    hard_link_refused => |row| {
        let mut program = Workload::new("files.py", "hard_link_and_lock").start();
        let images = row.next_images(&program);
        let options = Options::dump(&["--link-remap"]);
        row.dumper.dump(&program, &images, &options).expect_refusal("lock");
        let names: Vec<_> = fs::read_dir(program.dir())
            .expect("reading the directory")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with("link_remap"))
            .collect();
        assert!(names.is_empty(), "left over: {names:?}");
        program.finish();
    };

    /// Deleted files are kept up to a limit.
    unlinked_large => |row| {
        let mut program = Workload::new("files.py", "unlinked_large").start();
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &row.options).expect_refusal("--ghost-limit");
        row.with(Options::dump(&["--ghost-limit", "4M"])).cycle(&program);
        program.finish();
    };

    /// A descriptor of a file that belongs to somebody outside is given at the restore.
    given_file => |row| {
        let mut program = Workload::new("files.py", "waits").start();
        let images = row.dump(&program);
        let given = fs::File::open(program.file("data")).expect("opening the file");
        let name = program.file("data").display().to_string();
        let options = Options::given(&name, given);
        fs::rename(program.file("data"), program.file("elsewhere")).expect("renaming the file");
        row.with(options).restore(&program, &images);
        program.finish();
    };

    /// A file that is no longer there: refused with its name.
    file_missing => |row| {
        let mut program = Workload::new("files.py", "waits").start();
        let tree = program.tree();
        let images = row.dump(&program);
        fs::rename(program.file("data"), program.file("elsewhere")).expect("renaming the file");
        row.restorer.restore(&images, &row.options).expect_refusal("data");
        let left = reaper::wait_gone(&tree, std::time::Duration::from_secs(5));
        assert!(left.is_empty(), "left over from a restore that failed: {left:?}");
        fs::rename(program.file("elsewhere"), program.file("data")).expect("putting the file back");
        row.restore(&program, &images);
        program.finish();
    };

    /// Standard output is a file, and what comes after goes behind what came before.
    output_goes_on => |row| {
        let mut program = Workload::new("counter.py", "counter").start();
        let mut out = fs::OpenOptions::new().append(true).open(program.file("out")).expect("opening the output");
        row.with(Options::default()).cycle(&program);
        out.write_all(b"between\n").expect("writing");
        program.finish();
        assert_eq!(fs::read_to_string(program.file("out")).expect("reading"), "between\n");
    };
}

mod interop {
    e2e::interop_rows! { "files.py";
        positions_and_flags unlinked unlinked_of_two temporary other_name duplicates shared_across_fork devices
    }
    e2e::interop_rows! { "files.py", ["--link-remap"]; hard_link }
    e2e::interop_rows! { "files.py", ["--file-locks"]; posix_locks flock_locks ofd_locks lease }
    e2e::interop_rows! { "memory.py"; memfd memfd_sealed memfd_private deleted_backing_private deleted_backing_shared }
    e2e::interop_rows! { "events.py"; inotify_watches }
}
