//! No bytes, in whatever file, make a reader panic or believe what is not there.

use std::fs;

use proptest::prelude::*;
use prost::Message;

use super::{proto::*, *};

fn inventory() -> InventoryEntry {
    InventoryEntry { img_version: 2, fdinfo_per_id: Some(true), ..Default::default() }
}

/// A directory that counts as complete, without the time that a real commit takes.
fn complete(dir: &ImageDir) {
    dir.write_one(ImageKind::Inventory, &inventory()).unwrap();
}

fn kind() -> impl Strategy<Value = ImageKind> {
    proptest::sample::select(ImageKind::ALL)
}

/// Messages with their lengths, of random fields: such a message gets further into a decoder than mere bytes.
fn messages() -> impl Strategy<Value = Vec<u8>> {
    let field = (1_u32..24, 0_u8..4, any::<u32>(), proptest::collection::vec(any::<u8>(), 0..12)).prop_map(
        |(number, wire, value, bytes)| {
            let mut out = Vec::new();
            match wire {
                0 => prost::encoding::uint32::encode(number, &value, &mut out),
                1 => prost::encoding::fixed64::encode(number, &value.into(), &mut out),
                2 => prost::encoding::bytes::encode(number, &bytes, &mut out),
                _ => prost::encoding::uint64::encode(number, &(u64::from(value) << 12), &mut out),
            }
            out
        },
    );
    let message = proptest::collection::vec(field, 0..8).prop_map(|fields| {
        let body = fields.concat();
        [&(body.len() as u32).to_le_bytes()[..], &body].concat()
    });
    (proptest::collection::vec(message, 0..4), proptest::collection::vec(any::<u8>(), 0..16))
        .prop_map(|(messages, tail)| [messages.concat(), tail].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_in_any_file(
        kind in kind(),
        with_header in any::<bool>(),
        body in prop_oneof![proptest::collection::vec(any::<u8>(), 0..200), messages()],
    ) {
        let tmp = tempfile::tempdir().unwrap();
        let dir = ImageDir::create(tmp.path()).unwrap();
        let name = kind.id(1);
        let bytes = if with_header { [kind.header(), body].concat() } else { body };
        fs::write(dir.path_of(name), &bytes).unwrap();
        fs::write(dir.path_of(ImageKind::Pages.id(1)), [0; 4096]).unwrap();
        let _ = check::file(&dir, name);
        let _ = references::dump(&dir);
        let _ = dir.read_all::<FileEntry>(name);
    }

    #[test]
    fn messages_survive_the_way_to_disk_and_back(entries in proptest::collection::vec(
        (any::<u32>(), any::<[u32; 3]>(), proptest::collection::vec(any::<u32>(), 0..50)), 0..300,
    )) {
        let tmp = tempfile::tempdir().unwrap();
        let dir = ImageDir::create(tmp.path()).unwrap();
        let entries: Vec<_> = entries
            .into_iter()
            .map(|(pid, [ppid, pgid, sid], threads)| PstreeEntry { pid, ppid, pgid, sid, threads })
            .collect();
        dir.write_all(ImageKind::Pstree, &entries).unwrap();
        prop_assert_eq!(dir.read_all::<PstreeEntry>(ImageKind::Pstree).unwrap(), entries);
    }

    #[test]
    fn what_decodes_encodes_to_the_same(bytes in messages()) {
        fn same<M: Message + Default + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
            if let Ok(message) = M::decode(bytes) {
                assert_eq!(M::decode(&*message.encode_to_vec()).unwrap(), message);
            }
        }
        let body = bytes.get(4..).unwrap_or_default();
        same::<CoreEntry>(body);
        same::<FileEntry>(body);
        same::<MmEntry>(body);
        same::<InetSkEntry>(body);
        same::<TtyInfoEntry>(body);
    }

    #[test]
    fn a_dump_with_a_wrong_byte_is_read_or_refused(
        file in 0_usize..8, at in any::<proptest::sample::Index>(), byte in any::<u8>(),
    ) {
        let tmp = tempfile::tempdir().unwrap();
        let dir = sample(tmp.path());
        let names = dir.list().unwrap();
        let path = dir.path_of(names[file % names.len()]);
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        fs::write(&path, &bytes).unwrap();
        let _ = references::dump(&dir);
        drop(dir);
        let _ = ImageDir::open(tmp.path());
    }
}

/// The smallest dump that is whole: one process, one file, one page.
fn sample(path: &std::path::Path) -> ImageDir {
    let dir = ImageDir::create(path).unwrap();
    let tree = PstreeEntry { pid: 9, ppid: 1, pgid: 9, sid: 9, threads: vec![9] };
    dir.write_one(ImageKind::Pstree, &tree).unwrap();
    let core = CoreEntry {
        mtype: core_entry::March::X8664 as i32,
        thread_info: Some(ThreadInfoX86::default()),
        tc: Some(TaskCoreEntry { task_state: 1, comm: b"\xffsh".into(), ..Default::default() }),
        thread_core: Some(ThreadCoreEntry::default()),
        ..Default::default()
    };
    dir.write_one(ImageKind::Core.id(9), &core).unwrap();
    dir.write_one(ImageKind::Ids.id(9), &TaskKobjIdsEntry { files_id: 1, ..Default::default() }).unwrap();
    let reg = RegFileEntry { id: 5, name: b"bin/sh".into(), ..Default::default() };
    let file = FileEntry { r#type: FdTypes::Reg as i32, id: 5, reg: Some(reg.into()), ..Default::default() };
    dir.write_one(ImageKind::Files, &file).unwrap();
    let fd = FdinfoEntry { id: 5, fd: 0, r#type: FdTypes::Reg as i32, ..Default::default() };
    dir.write_one(ImageKind::Fdinfo.id(1), &fd).unwrap();
    dir.write_one(ImageKind::Fs.id(9), &FsEntry { cwd_id: 5, root_id: 5, umask: None }).unwrap();
    let vma = VmaEntry { start: 0x1000, end: 0x3000, shmid: 5, status: 1 << 6, fd: -1, ..Default::default() };
    dir.write_one(ImageKind::Mm.id(9), &MmEntry { exe_file_id: 5, vmas: vec![vma], ..Default::default() }).unwrap();
    let mut pages = PagesWriter::create(&dir, ImageKind::Pagemap.id(9), 1).unwrap();
    pages.append(PageRange::of_pages(0x2000, 1).unwrap()).unwrap();
    fs::write(pages.pages_path(), [1; 4096]).unwrap();
    pages.finish().unwrap();
    complete(&dir);
    dir.make_waiting().unwrap();
    dir
}

#[test]
fn contradictions_are_found() {
    let tmp = tempfile::tempdir().unwrap();
    let whole = |dir: &ImageDir| references::dump(dir).map_err(|e| e.to_string());
    let dir = sample(tmp.path());
    assert_eq!(whole(&dir), Ok(10));

    let breaks = |what: &str, change: &dyn Fn(&ImageDir)| {
        let tmp = tempfile::tempdir().unwrap();
        let dir = sample(tmp.path());
        change(&dir);
        let said = whole(&dir).expect_err(what);
        assert!(said.contains(what), "{said:?} does not say {what:?}");
    };
    breaks("which is nowhere", &|dir| dir.write_all::<FileEntry>(ImageKind::Files, []).unwrap());
    breaks("nothing for its type", &|dir| dir.write_one(ImageKind::Files, &FileEntry::default()).unwrap());
    breaks("is missing", &|dir| fs::remove_file(dir.path_of(ImageKind::Mm.id(9))).unwrap());
    breaks("is missing", &|dir| fs::remove_file(dir.path_of(ImageKind::Fdinfo.id(1))).unwrap());
    breaks("cut off", &|dir| fs::write(dir.path_of(ImageKind::Pages.id(1)), [1; 4095]).unwrap());
    breaks("where nothing is mapped", &|dir| {
        dir.write_one(ImageKind::Mm.id(9), &MmEntry { exe_file_id: 5, ..Default::default() }).unwrap();
    });
    breaks("no process in it", &|dir| dir.write_all::<PstreeEntry>(ImageKind::Pstree, []).unwrap());
    breaks("is there twice", &|dir| {
        let process = PstreeEntry { pid: 9, threads: vec![9, 9], ..Default::default() };
        dir.write_one(ImageKind::Pstree, &process).unwrap();
    });
    breaks("without an end", &|dir| {
        let filter = |prev| SeccompFilter { filter: vec![0; 8], prev: Some(prev), flags: None };
        let entry = SeccompEntry { seccomp_filters: vec![filter(1), filter(0)] };
        dir.write_one(ImageKind::Seccomp, &entry).unwrap();
    });
}

#[test]
fn lengths_are_not_believed() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::create(tmp.path()).unwrap();
    let with = |kind: ImageKind, body: &[u8]| {
        fs::write(dir.path_of(kind), [kind.header(), body.into()].concat()).unwrap();
        check::file(&dir, kind.into()).unwrap_err()
    };
    assert!(matches!(with(ImageKind::Files, &[0xff; 4]), ImageError::TooLong { .. }));
    assert!(matches!(with(ImageKind::Files, &[0, 0, 1, 0]), ImageError::Truncated { need: 0x10000, left: 0, .. }));
    assert!(matches!(with(ImageKind::Files, &[1, 0]), ImageError::Truncated { .. }));
    assert!(matches!(with(ImageKind::Cgroup, &[]), ImageError::Count { found: 0, .. }));
    assert!(matches!(with(ImageKind::Cgroup, &[0; 8]), ImageError::Count { found: 2, .. }));
    let big =
        PipeDataEntry { pipe_id: 1, bytes: u32::MAX, size: None, pieces: Vec::new() }.encode_length_delimited_to_vec();
    let body = [&[big.len() as u8 - 1, 0, 0, 0], &big[1..]].concat();
    assert!(matches!(with(ImageKind::PipesData, &body), ImageError::Truncated { need: 0xffff_ffff, .. }));
}
