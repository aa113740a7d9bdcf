//! Action scripts, and what else acts while a command goes on.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use e2e::{Look, Options, Program, Row, proc, rows};

use super::{counter, nothing_left};

/// Writes down what it sees of the tree at each moment, and fails where a file of that name tells it to.
const SCRIPT: &str = r#"#!/bin/sh
here="${0%/*}"
state=none
[ -n "$CRTOOLS_INIT_PID" ] && state=$(sed -n 's/^State:.\(.\).*/\1/p' "/proc/$CRTOOLS_INIT_PID/status")
inventory=no
[ -e "$CRTOOLS_IMAGE_DIR/inventory.img" ] && inventory=yes
echo "$CRTOOLS_SCRIPT_ACTION pid=$CRTOOLS_INIT_PID state=$state inventory=$inventory" >> "$here/moments"
[ ! -e "$here/fail-at-$CRTOOLS_SCRIPT_ACTION" ]
"#;

fn write_script(program: &Program, name: &str, text: &str) -> PathBuf {
    let script = program.file(name);
    fs::write(&script, text).expect("writing the script");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("chmod");
    script
}

/// The same row with the script, and other words for the dump.
fn with_script(row: &Row, program: &Program, words: &[&str]) -> Row {
    let script = write_script(program, "script", SCRIPT);
    let mut options = Options::both(&["--action-script", script.to_str().expect("a path")]);
    options.dump.extend(words.iter().map(Into::into));
    row.with(options)
}

fn moments(program: &Program) -> Vec<String> {
    let text = fs::read_to_string(program.file("moments")).expect("the script was called");
    text.lines().map(str::to_owned).collect()
}

rows! {
    /// In their order, and with the tree in the state that each promises.
    moments_and_what_they_promise => |row| {
        let mut program = counter().start();
        let row = with_script(row, &program, &[]);
        row.cycle(&program);
        let pid = program.pid();
        let said = moments(&program);
        let begins = [
            format!("pre-dump pid={pid} "),
            format!("post-dump pid={pid} state=t inventory=yes"),
            "pre-restore pid= state=none inventory=yes".to_owned(),
            format!("post-restore pid={pid} "),
            format!("pre-resume pid={pid} state=t inventory=yes"),
            format!("post-resume pid={pid} "),
        ];
        assert_eq!(said.len(), begins.len(), "{said:?}");
        for (line, begin) in said.iter().zip(&begins) {
            assert!(line.starts_with(begin), "{line:?} instead of {begin:?}");
        }
        program.finish();
    };

    /// A tree that runs on stands still all the same when the script is called: it may copy the program's files.
    tree_stands_at_post_dump => |row| {
        let mut program = counter().start();
        let row = with_script(row, &program, &["-R"]);
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &row.options).expect_success();
        assert!(moments(&program)[1].contains("state=t inventory=yes"), "{:?}", moments(&program));
        program.finish();
    };

    /// Whatever a script has against a dump: the program goes on untouched, and there is no dump.
    failing_in_a_dump => |row| {
        for words in [&[][..], &["-R"], &["-s"]] {
            let mut program = counter().start();
            let row = with_script(row, &program, words);
            for moment in ["pre-dump", "post-dump"] {
                let fails = program.file(&format!("fail-at-{moment}"));
                fs::write(&fails, "").expect("writing");
                let before = Look::at(&program);
                let images = row.next_images(&program);
                let outcome = row.dumper.dump(&program, &images, &row.options).expect_refusal(moment);
                assert_eq!(outcome.status.code(), Some(1), "{}", outcome.report());
                assert!(!images.join("inventory.img").exists(), "{moment}: an inventory is left");
                before.compare(&Look::at(&program));
                fs::remove_file(fails).expect("unlink");
            }
            program.finish();
        }
    };

    /// The same in a restore: nothing is left over, and the images are as good as before.
    failing_in_a_restore => |row| {
        let mut program = counter().start();
        let tree = program.tree();
        let row = with_script(row, &program, &[]);
        let images = row.dump(&program);
        for moment in ["pre-restore", "post-restore", "pre-resume"] {
            let fails = program.file(&format!("fail-at-{moment}"));
            fs::write(&fails, "").expect("writing");
            let outcome = row.restorer.restore(&images, &row.options).expect_refusal(moment);
            assert_eq!(outcome.status.code(), Some(1), "{}", outcome.report());
            nothing_left(&tree);
            assert!(!images.join("pid").exists(), "{moment}: a pid file is left");
            fs::remove_file(fails).expect("unlink");
        }
        // Too late to object: the tree runs.
        fs::write(program.file("fail-at-post-resume"), "").expect("writing");
        let restored = row.restore(&program, &images);
        assert!(restored.outcome.log.contains("Warn"), "no warning\n{}", restored.outcome.report());
        program.finish();
    };

    /// Several are run in the order of the command line; the first that fails is the last.
    several => |row| {
        let mut program = counter().start();
        let text = |number: u32| format!("#!/bin/sh\necho {number} >> \"${{0%/*}}/order\"\nexit {number}\n");
        let scripts: Vec<PathBuf> =
            (0..3).map(|number| write_script(&program, &format!("script-{number}"), &text(number))).collect();
        let words: Vec<&str> =
            scripts.iter().flat_map(|path| ["--action-script", path.to_str().expect("a path")]).collect();
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &Options::dump(&words)).expect_refusal("script-1");
        assert_eq!(fs::read_to_string(program.file("order")).expect("called"), "0\n1\n");
        program.finish();
    };

    /// One that cannot be run is found before anything happens.
    not_executable => |row| {
        let mut program = counter().start();
        let script = program.file("script");
        for there in [false, true] {
            if there {
                fs::write(&script, SCRIPT).expect("writing the script");
            }
            let images = row.next_images(&program);
            let options = Options::dump(&["--action-script", script.to_str().expect("a path")]);
            row.dumper.dump(&program, &images, &options).expect_refusal("cannot be run");
            assert!(!images.join("inventory.img").exists(), "a dump in spite of that");
        }
        program.finish();
    };

    /// Scripts live by the host's clocks, also while the tree's are other ones.
    clocks_of_scripts => |row| {
        let mut program = counter().start();
        let text = "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = pre-resume ] || exit 0\ncat /proc/self/timens_offsets > \"${0%/*}/offsets\"\n\
                    [ \"$(readlink /proc/self/ns/time)\" = \"$(readlink /proc/$PPID/ns/time)\" ]\n";
        let script = write_script(&program, "script", text);
        let row = row.with(Options::both(&["--action-script", script.to_str().expect("a path")]));
        let images = row.dump(&program);
        row.restore(&program, &images);
        assert!(proc::exists(program.pid()));
        program.finish();
    };
}
