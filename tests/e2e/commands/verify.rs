//! Images that are checked, and not restored.

use std::{fs, path::Path, process::Command};

use e2e::{Row, Workload, rows};

use super::counter;
use crate::track::on;

/// Does harm to a file.
type Spoil<'a> = &'a dyn Fn(&Path);

/// What `verify` says of a directory, and whether it is content.
fn verify(row: &Row, images: &Path) -> (bool, String) {
    let mut command = Command::new(row.restorer.binary());
    let out = command.args(["verify", "--json", "-D"]).arg(images).output().expect("starting the engine");
    let said = [out.stdout, out.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (out.status.success(), said)
}

rows! {
    /// A dump is whole, and goes on to be restored; one with a file that is gone, cut, or of another process is not, and the
    /// file is named.
    verified => |row| {
        let mut program = counter().start();
        let images = row.dump(&program);
        let (whole, said) = verify(row, &images);
        let found: serde_json::Value = serde_json::from_str(&said).expect("JSON");
        let names = fs::read_dir(&images).expect("images").flatten().map(|file| file.file_name());
        let files = names.filter(|name| name == "stats-dump" || name.to_string_lossy().ends_with(".img"));
        assert!(whole && found["parents"] == 0, "{said}");
        assert_eq!(found["files"].as_u64(), Some(files.count() as u64));

        let core = format!("core-{}.img", program.pid());
        let spoil: [(&str, Spoil); 4] = [
            (&core, &|path| fs::remove_file(path).expect("removing")),
            ("pages-1.img", &|path| fs::File::options().write(true).open(path).and_then(|f| f.set_len(4096)).expect("cut")),
            ("pstree.img", &|path| fs::write(path, b"nothing").expect("writing")),
            (&core, &|path| assert!(fs::copy(path.with_file_name("files.img"), path).is_ok())),
        ];
        for (name, spoil) in spoil {
            let file = images.join(name);
            let good = fs::read(&file).expect("an image");
            spoil(&file);
            let (whole, said) = verify(row, &images);
            assert!(!whole && said.contains(name), "{name} is spoilt, and it says {said}");
            fs::write(&file, good).expect("writing");
        }
        assert!(verify(row, &images).0);
        row.restore(&program, &images);
        program.finish();
    };

    /// Of a pre-dump there is only memory, and a dump needs those before it.
    verified_chain => |row| {
        let mut program = Workload::new("memory.py", "scattered_pages").start();
        let parent = row.next_images(&program);
        row.dumper.pre_dump(&program, &parent, None).expect_success();
        assert!(verify(row, &parent).0);
        let tree = program.tree();
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &on(&parent)).expect_success();
        program.expect_gone(&tree);
        let (whole, said) = verify(row, &images);
        assert!(whole && said.contains(r#""parents":1"#), "{said}");
        fs::rename(&parent, program.file("away")).expect("renaming");
        let (whole, said) = verify(row, &images);
        assert!(!whole && said.contains("images-2/parent"), "{said}");
        fs::rename(program.file("away"), &parent).expect("renaming");
        row.restore(&program, &images);
        program.finish();
    };
}
