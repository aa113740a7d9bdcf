//! Image directories: when a dump is one, who may open it, what is refused.

use std::{
    fs::{self, File},
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use super::{
    proto::{InventoryEntry, PipeDataEntry, PstreeEntry, StatsEntry},
    *,
};

fn inventory() -> InventoryEntry {
    InventoryEntry { fdinfo_per_id: Some(true), ns_per_id: Some(true), ..Default::default() }
}

fn tree() -> Vec<PstreeEntry> {
    (1..4).map(|pid| PstreeEntry { pid, ppid: pid - 1, pgid: 1, sid: 1, threads: vec![pid, pid + 10] }).collect()
}

#[test]
fn a_dump_is_one_after_its_inventory_only() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("dump");
    let dir = ImageDir::create(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(matches!(ImageDir::create(&path), Err(ImageError::Busy { .. })));
    dir.write_all(ImageKind::Pstree, &tree()).unwrap();
    dir.sync().unwrap();
    let file = fs::metadata(dir.path_of(ImageKind::Pstree)).unwrap();
    assert_eq!(file.permissions().mode() & 0o777, 0o600);
    drop(dir);
    assert!(matches!(ImageDir::open(&path), Err(ImageError::Incomplete { .. })));

    let dir = ImageDir::create(&path).unwrap();
    dir.write_all(ImageKind::Pstree, &tree()).unwrap();
    dir.commit(&inventory(), Lasting::OnDisk).unwrap();
    assert!(matches!(ImageDir::open(&path), Err(ImageError::Busy { .. })));
    drop(dir);
    let dir = ImageDir::open(&path).unwrap();
    assert_eq!(dir.inventory().unwrap().img_version, IMG_VERSION);
    assert_eq!(dir.read_all::<PstreeEntry>(ImageKind::Pstree).unwrap(), tree());
    assert_eq!(dir.list().unwrap(), [ImageKind::Inventory.into(), ImageKind::Pstree.into()]);
    // Readers do not keep each other out, but writers.
    let _other = ImageDir::open(&path).unwrap();
    assert!(matches!(ImageDir::create(&path), Err(ImageError::Busy { .. })));
}

#[test]
fn a_second_dump_leaves_open_files_of_the_first_alone() {
    let tmp = tempfile::tempdir().unwrap();
    let first = ImageDir::create(tmp.path()).unwrap();
    first.write_all(ImageKind::Pstree, &tree()).unwrap();
    first.write_one(ImageKind::Core.id(7), &inventory()).unwrap();
    first.commit(&inventory(), Lasting::OnDisk).unwrap();
    let old = first.reader(ImageKind::Pstree).unwrap();
    drop(first);

    let second = ImageDir::create(tmp.path()).unwrap();
    assert!(second.exists(ImageKind::Inventory).unwrap(), "nothing is lost before the first file is written");
    second.write_all(ImageKind::Pstree, &tree()[..1]).unwrap();
    assert_eq!(second.list().unwrap(), [ImageKind::Pstree.into()]);
    assert_eq!(old.messages::<PstreeEntry>().count(), 3);
}

#[test]
fn links_and_other_things_are_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("dump");
    let dir = ImageDir::create(&path).unwrap();
    dir.write_all(ImageKind::Pstree, &tree()).unwrap();
    symlink(&path, tmp.path().join("link")).unwrap();
    assert!(matches!(ImageDir::create(tmp.path().join("link")), Err(ImageError::Dir { .. })));

    let victim = tmp.path().join("victim");
    fs::write(&victim, "mine").unwrap();
    symlink(&victim, dir.path_of(ImageKind::Files)).unwrap();
    dir.write_one(ImageKind::Files, &inventory()).unwrap();
    assert!(matches!(dir.sync(), Err(ImageError::NotRegular { .. })));
    assert!(matches!(dir.reader(ImageKind::Files), Err(ImageError::NotRegular { .. })));
    assert_eq!(fs::read(&victim).unwrap(), b"mine");
    fs::create_dir(dir.path_of(ImageKind::Cgroup)).unwrap();
    assert!(matches!(dir.reader(ImageKind::Cgroup), Err(ImageError::NotRegular { .. })));
    assert!(matches!(dir.reader(ImageKind::Seccomp), Err(ImageError::Missing { .. })));
}

#[test]
fn both_layouts_are_read_and_wrong_magics_are_not() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::create(tmp.path()).unwrap();
    dir.write_all(ImageKind::Pstree, &tree()).unwrap();
    dir.sync().unwrap();
    let path = dir.path_of(ImageKind::Pstree);
    let new = fs::read(&path).unwrap();
    fs::write(&path, &new[4..]).unwrap();
    assert_eq!(dir.read_all::<PstreeEntry>(ImageKind::Pstree).unwrap(), tree());
    fs::write(dir.path_of(ImageKind::Files), &new).unwrap();
    let err = dir.reader(ImageKind::Files).unwrap_err();
    assert!(matches!(err, ImageError::Magic { offset: 4, found: 0x5027_3030, .. }), "{err}");
    fs::write(&path, &new[..new.len() - 1]).unwrap();
    let err = dir.read_all::<PstreeEntry>(ImageKind::Pstree).unwrap_err();
    assert!(matches!(err, ImageError::Truncated { .. }), "{err}");
}

#[test]
fn data_stands_behind_its_message() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = ImageDir::create(tmp.path()).unwrap();
    let entry = |bytes| PipeDataEntry { pipe_id: 1, bytes, size: Some(65536), pieces: Vec::new() };
    let data = vec![7; 200_000];
    let source = tmp.path().join("source");
    fs::write(&source, &data).unwrap();

    let mut writer = dir.writer(ImageKind::PipesData).unwrap();
    writer.message_with_payload(&entry(5), b"hello").unwrap();
    assert!(writer.message_with_payload(&entry(5), b"hell").is_err());
    writer.message(&entry(200_000)).unwrap();
    writer.payload_from(&mut File::open(&source).unwrap(), 200_000).unwrap();
    let end = writer.position();
    writer.message_with_payload(&entry(200_000), &data).unwrap();
    writer.finish().unwrap();

    let mut reader = dir.reader(ImageKind::PipesData).unwrap();
    assert_eq!(reader.message_with_payload::<PipeDataEntry>().unwrap().unwrap().1, b"hello");
    let (message, at) = reader.message_over_payload::<PipeDataEntry>().unwrap().unwrap();
    assert_eq!((message.payload_len(), at + 200_000), (200_000, end));
    assert_eq!(reader.message_with_payload::<PipeDataEntry>().unwrap().unwrap().1, data);
    assert!(reader.message::<PipeDataEntry>().unwrap().is_none());
}

#[test]
fn chains_of_parents_end() {
    let tmp = tempfile::tempdir().unwrap();
    for n in 0..3 {
        let dir = ImageDir::create(tmp.path().join(n.to_string())).unwrap();
        dir.set_parent(Path::new("../absent")).unwrap();
        dir.set_parent(&Path::new("..").join((n + 1).to_string())).unwrap();
        dir.commit(&inventory(), Lasting::OnDisk).unwrap();
    }
    let open = || ImageDir::open(tmp.path().join("0"));
    assert!(open().unwrap().parents().is_err(), "the last one is missing");
    ImageDir::create(tmp.path().join("3")).unwrap().commit(&inventory(), Lasting::OnDisk).unwrap();
    assert_eq!(open().unwrap().parents().unwrap().len(), 3);
    symlink("../1", tmp.path().join("3/parent")).unwrap();
    assert!(matches!(open().unwrap().parents(), Err(ImageError::Parents { .. })));
}

#[test]
fn how_it_went_is_told_anywhere() {
    let tmp = tempfile::tempdir().unwrap();
    let stats = StatsEntry { restore: Some(Default::default()), dump: None };
    for _ in 0..2 {
        write_service(tmp.path(), ImageKind::StatsRestore, &stats).unwrap();
    }
    let dir = ImageDir::create(tmp.path()).unwrap();
    dir.write_all(ImageKind::Pstree, &tree()).unwrap();
    assert_eq!(dir.read_one::<StatsEntry>(ImageKind::StatsRestore).unwrap(), stats, "a new dump leaves it there");
}
