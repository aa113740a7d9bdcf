//! What cannot be done is said in one clear sentence, and nothing has changed.

use std::{ffi::OsString, fs, os::unix::fs::PermissionsExt, path::Path};

use e2e::{Look, Options, Outcome, Program, Row, proc, rows};

use super::{counter, nothing_left};

/// A call that must fail with this reason, leave no dump and the program as it was.
fn refused(row: &Row, reason: &str, call: impl Fn(&Program, &Path) -> Outcome) {
    let mut program = counter().start();
    let images = row.next_images(&program);
    let before = Look::at(&program);
    let outcome = call(&program, &images).expect_refusal(reason);
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.report());
    let printed: Vec<&str> = outcome.printed.lines().collect();
    assert!(printed.len() == 1 && printed[0].starts_with("criu-ebpf: "), "not one clear sentence: {printed:?}");
    assert!(!images.join("inventory.img").exists(), "refused, but it left an inventory behind");
    before.compare(&Look::at(&program));
    program.finish();
}

/// A dump of something else than the program, with these words instead of its pid.
fn refused_pid(row: &Row, reason: &str, pid: impl Fn(&Program) -> i32) {
    refused(row, reason, |program, images| {
        fs::create_dir_all(images).expect("mkdir");
        let mut words = row.dumper.dump_words(program, images, &row.options);
        let at = words.iter().position(|word| word == "-t").expect("there is one") + 1;
        words[at] = pid(program).to_string().into();
        row.dumper.call(&words, images, "dump")
    });
}

/// A restore that must fail with this reason and leave nothing over, after `spoil` has done something to the images.
fn refused_restore(row: &Row, reason: &str, spoil: impl Fn(&Program, &Path)) {
    let program = counter().start();
    let tree = program.tree();
    let images = row.dump(&program);
    spoil(&program, &images);
    let outcome = row.restorer.restore(&images, &row.options).expect_refusal(reason);
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.report());
    nothing_left(&tree);
}

/// A dump onto a file system of its own, which goes with it; an inventory there is a failure of another kind.
fn on_small_disk(row: &Row, program: &Program, images: &Path, size: &str, prepare: &str) -> Outcome {
    let script = format!(
        "mount -t tmpfs -o size={size} none \"$0\" || exit 3; {prepare}; \"$@\"; ended=$?
        [ -e \"$0/inventory.img\" ] && ended=4; umount -l \"$0\"; exit $ended"
    );
    let words: Vec<OsString> = row.dumper.dump_words(program, images, &row.options);
    row.dumper.call_by(&script, &words, images, "dump")
}

rows! {
    /// The images directory is a file.
    no_directory => |row| refused(row, "/dev/null", |program, images| {
        fs::create_dir(images).expect("mkdir");
        let words: [OsString; 5] = ["dump", "-t", &program.pid().to_string(), "-D", "/dev/null"].map(Into::into);
        row.dumper.call(&words, images, "dump")
    });

    /// The way to it does not exist.
    no_way_to_the_directory => |row| refused(row, "/no/such", |program, images| {
        fs::create_dir(images).expect("mkdir");
        let words: [OsString; 5] = ["dump", "-t", &program.pid().to_string(), "-D", "/no/such/directory"].map(Into::into);
        row.dumper.call(&words, images, "dump")
    });

    /// Statistics and logs have nowhere to go: found before the program is touched.
    no_work_directory => |row| refused(row, "--work-dir", |program, images| {
        row.dumper.dump(program, images, &Options::dump(&["-W", "/no/such/directory"]))
    });

    /// No room for the memory; the descriptor by which the program wrote it is gone again.
    full_disk => |row| refused(row, "make room", |program, images| {
        fs::create_dir(images).expect("mkdir");
        on_small_disk(row, program, images, "64k", ":")
    });

    /// No room for the first image even.
    no_room_at_all => |row| refused(row, "make room", |program, images| {
        fs::create_dir(images).expect("mkdir");
        on_small_disk(row, program, images, "8k", "head -c 8k /dev/zero > \"$0/full\"")
    });

    /// Somebody who may not.
    no_privilege => |row| refused(row, "CAP_SYS_PTRACE", |program, images| {
        fs::create_dir(images).expect("mkdir");
        fs::set_permissions(program.dir(), fs::Permissions::from_mode(0o755)).expect("chmod");
        std::os::unix::fs::chown(images, Some(65534), Some(65534)).expect("chown");
        // Nobody may load eBPF programs either, which would be the first thing to say.
        let words: Vec<OsString> = row.dumper.dump_words(program, images, &Options::default());
        let words: Vec<OsString> = words.into_iter().map(|word| if word == "ebpf" { "proc".into() } else { word }).collect();
        row.dumper.call_by("exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"", &words, images, "dump")
    });

    /// Nobody has such a pid: it is beyond all that the kernel gives.
    no_such_pid => |row| refused_pid(row, "no process 4194304", |_| 4_194_304);

    /// The kernel's own.
    kernel_thread => |row| refused_pid(row, "thread of the kernel", |_| 2);

    /// The engine would have to stop itself: the tree of whoever started it.
    own_ancestor => |row| refused_pid(row, "outside of the tree", |_| i32::try_from(std::process::id()).expect("a pid"));

    /// The one above all.
    init => |row| refused_pid(row, "outside of the tree", |_| 1);

    /// A number that is a thread's.
    thread => |row| {
        let mut threads = e2e::Workload::new("threads.c", "many").start();
        let (pid, tids) = (threads.pid(), proc::threads(threads.pid()));
        let tid = *tids.iter().find(|&&tid| tid != pid).expect("a thread");
        refused_pid(row, &format!("{tid} is a thread of process {pid}"), |_| tid);
        threads.finish();
    };

    /// A part of the dump was not copied.
    missing_image => |row| refused_restore(row, "is missing", |program, images| {
        fs::remove_file(images.join(format!("mm-{}.img", program.pid()))).expect("unlink");
    });

    /// A dump that was not finished.
    no_inventory => |row| refused_restore(row, "not a complete dump", |_, images| {
        fs::remove_file(images.join("inventory.img")).expect("unlink");
    });

    /// Images of a time to come.
    other_version => |row| refused_restore(row, "images of version", |_, images| {
        let path = images.join("inventory.img");
        let mut bytes = fs::read(&path).expect("reading");
        // A magic and a length, then the version as the first field.
        assert_eq!(&bytes[8..10], &[0x08, 0x02], "the inventory begins in another way: {bytes:?}");
        bytes[9] = 0x09;
        fs::write(&path, bytes).expect("writing");
    });

    /// There is no such directory.
    nothing_to_restore => |row| {
        let dir = tempfile::tempdir().expect("a directory");
        let words = ["restore", "-d", "-D", "/no/such/images"].map(OsString::from);
        row.restorer.call(&words, dir.path(), "restore").expect_refusal("/no/such/images");
    };
}
